"""Weights of one role in different layers, told by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Up to the last number: the layer. What follows is the weight's place in it.
_NAME = re.compile(r"(?P<layer>(?:.*\.)?\d+\.)?(?P<place>.+)")
_ATTRIBUTE = ".weight"


def kinds(names: Iterable[str]) -> dict[str, str]:
    """For every name what its counterparts in other layers have in common.

    As many of its last parts as tell all weights of one layer apart: ``"q_proj"`` in a Llama, but
    ``"attention.output.dense"`` and ``"output.dense"`` in a BERT.
    """
    parts = {name: _split(name) for name in names}
    deepest = max((len(place) for _, place in parts.values()), default=1)
    for depth in range(1, deepest + 1):
        found = {name: ".".join(place[-depth:]) for name, (_, place) in parts.items()}
        if len({(parts[name][0], kind) for name, kind in found.items()}) == len(found):
            break
    return found


def layer_of(name: str) -> int | None:
    """The first number in a name."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number[1]) if number else None


def _split(name: str) -> tuple[str, list[str]]:
    match = _NAME.fullmatch(name.removesuffix(_ATTRIBUTE) or name)
    assert match is not None  # no name is empty
    return match["layer"] or "", match["place"].split(".")
