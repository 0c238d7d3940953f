"""Which sites are heads: their outputs are logits, of which only differences matter."""

from __future__ import annotations

from torch import fx

from fp4compile.trace import Site

# A head has a vocabulary of outputs. Smaller last layers may be heads or regressions: who knows.
OUTPUTS_PER_CHANNEL = 3


def is_head(site: Site, outputs: int, channels: int) -> bool:
    """Whether a weight ``[outputs, channels]`` is tied to an embedding, or has many outputs that
    the model returns, perhaps cast, cut or capped.
    """
    if site.lookups:
        return bool(site.uses)
    many = outputs >= OUTPUTS_PER_CHANNEL * channels
    return many and all(_is_returned(node) for node in site.linears)


def _is_returned(node: fx.Node) -> bool:
    """Whether nothing else reads ``node``; what has a second tensor as input is a layer."""
    users = list(node.users)
    return bool(users) and all(
        user.op == "output" or (len(user.all_input_nodes) == 1 and _is_returned(user))
        for user in users
    )
