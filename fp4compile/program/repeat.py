"""A call like the one before: decode steps differ in the values of a few tensors only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fp4compile.program.values import FlatCache, Flattened, is_cache

# Whether a value is like the one that it was made of; tensors are appended in order.
Matches = Callable[[Any, list[Tensor]], bool]


class Pattern:
    """What ``value``, which is flat as ``flat``, is like.

    It keeps the tensors of caches alive.
    """

    def __init__(self, value: Any, flat: Flattened) -> None:
        self._flat = flat
        self._matches = _like(value, iter(flat.flat_caches))

    def flatten(self, value: Any) -> Flattened | None:
        """``value`` flattened, if only values of tensors are different."""
        tensors: list[Tensor] = []
        return self._flat.with_tensors(tensors) if self._matches(value, tensors) else None


def _like(value: Any, caches: Iterator[FlatCache]) -> Matches:
    if isinstance(value, Tensor):
        return _like_tensor(value)
    if isinstance(value, dict):
        return _like_dict(value, caches)
    if type(value) in (tuple, list):
        return _like_sequence(value, caches)
    if is_cache(value):
        return _like_cache(next(caches))
    return lambda other, _: type(other) is type(value) and other == value


def _like_tensor(value: Tensor) -> Matches:
    def kind(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    known = kind(value)

    def matches(other: Any, tensors: list[Tensor]) -> bool:
        if not isinstance(other, Tensor) or other.requires_grad or kind(other) != known:
            return False
        tensors.append(other)
        return True

    return matches


def _like_dict(value: dict[Any, Any], caches: Iterator[FlatCache]) -> Matches:
    names, items = list(value), [_like(item, caches) for item in value.values()]

    def matches(other: Any, tensors: list[Tensor]) -> bool:
        return (
            type(other) is type(value)
            and list(other) == names
            and all(like(item, tensors) for like, item in zip(items, other.values(), strict=True))
        )

    return matches


def _like_sequence(value: list[Any] | tuple[Any, ...], caches: Iterator[FlatCache]) -> Matches:
    items = [_like(item, caches) for item in value]

    def matches(other: Any, tensors: list[Tensor]) -> bool:
        return (
            type(other) is type(value)
            and len(other) == len(items)
            and all(like(item, tensors) for like, item in zip(items, other, strict=True))
        )

    return matches


def _like_cache(cache: FlatCache) -> Matches:
    def matches(other: Any, tensors: list[Tensor]) -> bool:
        tensors.extend(cache.tensors)
        return cache.holds(other)

    return matches
