"""How much a layer's rounding error on each token moves the model's outputs.

To second order the loss of accuracy is the sum of ``g^2 e^2`` over the outputs of a layer, where e
is the error and g the gradient of the outputs' log-likelihood, labels drawn from the model itself
(Fisher information; of its many uses in quantization GuidedQuant, Kim et al., arXiv 2505.07004, is
the nearest). Averaged over the layer's outputs that is one number per token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fp4compile.batches import Batch, token_mask
from fp4compile.errors import UnsupportedOperationError
from fp4compile.heads import is_head
from fp4compile.trace import Graph, Group

logger = logging.getLogger(__name__)

_TINY = 1e-30
# Arguments of transformers' models.
_SAMPLES_FIRST = frozenset({"input_ids", "inputs_embeds", "pixel_values", "input_features"})


def sensitivities(
    model: nn.Module, graph: Graph, batches: Iterable[tuple[int, Batch]]
) -> dict[Group, list[Tensor]]:
    """For every group of linears: one tensor per batch, of the shape of its input without channels,
    mean 1 over all of them. Stacks of experts, convolutions and weights with several inputs are
    left out.

    Args:
        batches: with numbers, from which labels are drawn.

    Raises:
        UnsupportedOperationError: the model has no gradient there.
    """
    groups = [g for g in graph.groups if len(g.inputs) == 1 and not g.patch and g.offsets is None]
    found: dict[str, list[Tensor]] = {site.name: [] for g in groups for site in g.sites}
    # Without a copy of any weight.
    shapes = {site: model.get_parameter(site.name).shape[-2:] for g in groups for site in g.sites}
    sizes = {site: shape[::-1] if site.transposed else shape for site, shape in shapes.items()}
    heads = {int(size[0]) for site, size in sizes.items() if is_head(site, *size)}
    with _without_gradients(model), torch.enable_grad():
        for number, batch in batches:
            generator = torch.Generator().manual_seed(number)
            parts = []
            for part in single_samples(graph, batch):
                one = _Gradients(graph, groups)
                one.backward(part, heads, generator)
                parts.append(one.squares)
            for name in parts[0]:
                found[name].append(torch.cat([squares[name] for squares in parts]))
    combined = {group: _combined([found[site.name] for site in group.sites]) for group in groups}
    seen = {group: weights for group, weights in combined.items() if weights}
    logger.info(
        "tokens count by gradient for %d of %d groups of weights, else by power",
        len(seen),
        len(graph.groups),
    )
    return seen


def single_samples(graph: Graph, batch: Batch) -> list[Batch]:
    """``batch`` one sample at a time, since going back holds every value; whole where its first
    dimension is not known to be that of samples, or the graph was not traced for any number.
    """
    inputs = [node.meta.get("val") for node in graph.module.graph.find_nodes(op="placeholder")]
    traced = [x.shape[:1] for x in inputs if isinstance(x, Tensor)]
    any_number = all(size and not isinstance(size[0], int) for size in traced)
    leaves, spec = pytree.tree_flatten(batch)
    sizes = {tuple(x.shape[:1]) for x in leaves if isinstance(x, Tensor)}
    if not (_SAMPLES_FIRST & batch[1].keys() and any_number and len(sizes) == 1):
        return [batch]
    ((count,),) = sizes
    return [
        pytree.tree_unflatten([x[i : i + 1] if isinstance(x, Tensor) else x for x in leaves], spec)
        for i in range(count)
    ]


def _combined(sites: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sum over sites, each with mean 1, per batch; nothing where one was not seen."""
    if not all(sites):
        return []
    count = sum(squares.numel() for squares in sites[0])
    means = [max(sum(float(x.sum()) for x in squares) / count, _TINY) for squares in sites]
    return [
        sum((x / mean for x, mean in zip(rest, means[1:], strict=True)), first / means[0])
        / len(sites)
        for first, *rest in zip(*sites, strict=True)
    ]


class _Gradients(fx.Interpreter):
    """``squares`` by site: of one batch, the mean square of the gradient over a token's outputs."""

    def __init__(self, graph: Graph, groups: Sequence[Group]) -> None:
        super().__init__(graph.module)
        self._inputs = {node for group in groups for node in group.inputs}
        self._sites = {n: site.name for g in groups for site in g.sites for n in site.linears}
        self.squares: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if n in self._inputs and not value.requires_grad:
            value = value.detach().requires_grad_()  # here gradients begin
        if n in self._sites and value.requires_grad:
            # A hook that held this interpreter, and with it the outputs, would never be freed.
            value.register_hook(partial(_add, self.squares, self._sites[n]))
        return value

    def backward(self, batch: Batch, heads: set[int], generator: torch.Generator) -> None:
        """Run ``batch`` forth and back."""
        leaves = pytree.tree_leaves((tuple(batch[0]), dict(batch[1])))
        mask = token_mask(batch)
        try:
            outputs = [y for y in pytree.tree_leaves(self.run(*leaves)) if isinstance(y, Tensor)]
            output = next(y for y in outputs if y.requires_grad)
            _surprise(output, output.shape[-1] in heads, mask, generator).backward()
        except (RuntimeError, StopIteration) as error:  # what autograd raises
            reason = str(error).strip().partition("\n")[0] or "none of them depends on a weight"
            raise UnsupportedOperationError(
                f"the model's outputs have no gradient: {reason}; token_weights='gradient' needs "
                "one, use token_weights='power'"
            ) from error


def _add(squares: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    squares[name] = gradient.to(torch.float32).square().mean(dim=-1)


def _surprise(
    output: Tensor, are_logits: bool, mask: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Minus the log-likelihood of labels drawn for ``output``; of features, their sum with random
    signs, whose squared gradient is that of all features on average.
    """
    y = output.to(torch.float32)
    if are_logits:
        log_p = y.log_softmax(dim=-1)
        rows = log_p.detach().exp().cpu().flatten(0, -2)
        drawn = torch.multinomial(rows, 1, generator=generator).view(*y.shape[:-1], 1)
        each = -log_p.gather(-1, drawn.to(y.device))
    else:
        signs = torch.randint(0, 2, y.shape, generator=generator, device="cpu") * 2 - 1
        each = y * signs.to(y.device)
    if mask is not None and mask.shape == each.shape[:2]:
        each = each[mask]
    return each.sum()


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``model`` requires a gradient."""
    requiring = [p for p in model.parameters() if p.requires_grad]
    for parameter in requiring:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in requiring:
            parameter.requires_grad_()
