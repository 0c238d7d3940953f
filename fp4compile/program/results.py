"""Nested results of a call, and what it left in its caches, as flat values plus a template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fp4compile.program.values import CONSTANTS, NotFlat, check_cache, is_cache


@dataclass(frozen=True)
class Slot:
    """Stands for the tensor at ``index`` of the flat values."""

    index: int


@dataclass(frozen=True)
class InputCache:
    """Stands for the ``index``-th cache that the caller passed in."""

    index: int


@dataclass(frozen=True)
class LayerState:
    """What a call changed in one layer of a cache: attributes, of which tensors are slots."""

    layer: Any
    attributes: dict[str, Any]


class Results:
    """Template of a call's result and of what it left in its caches; ``values`` fill the slots."""

    def __init__(self, result: Any, caches: Sequence[Any], before: Sequence[Any]) -> None:
        """``before``: :func:`states` of the caches before the call."""
        self.values: list[Any] = []
        self._caches = caches
        self.result = self._template(result)
        self.cache_states = [
            tuple(
                self._layer(layer, old[index] if index < len(old) else {})
                for index, layer in enumerate(cache.layers)
            )
            for cache, old in zip(caches, before, strict=True)
        ]

    def _template(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._slot(value)
        if is_cache(value):
            for index, cache in enumerate(self._caches):
                if value is cache:
                    return InputCache(index)
            check_cache(value)
            clone = copy.copy(value)
            clone.layers = [self._layer(layer) for layer in value.layers]
            return clone
        if isinstance(value, CONSTANTS):
            return value
        if type(value) in (tuple, list):
            return type(value)(self._template(item) for item in value)
        if isinstance(value, dict):  # results of transformers among them
            return type(value)(**{name: self._template(item) for name, item in value.items()})
        raise NotFlat(f"a result of type {type(value).__name__}")

    def _slot(self, value: Any) -> Slot:
        for index, known in enumerate(self.values):
            if known is value:
                return Slot(index)
        self.values.append(value)
        return Slot(len(self.values) - 1)

    def _layer(self, layer: Any, before: dict[str, Any] | None = None) -> LayerState:
        before = before or {}
        attributes = {
            name: self._template(value)
            for name, value in vars(layer).items()
            if name not in before or value is not before[name]
        }
        return LayerState(layer, attributes)


def states(caches: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """The attributes of every layer of every cache."""
    return [[dict(vars(layer)) for layer in cache.layers] for cache in caches]


def fill(template: Any, values: Sequence[Any], caches: Sequence[Any]) -> Any:
    """The result that ``template`` stands for."""
    if isinstance(template, Slot):
        return values[template.index]
    if isinstance(template, InputCache):
        return caches[template.index]
    if isinstance(template, (tuple, list)):
        return type(template)(fill(item, values, caches) for item in template)
    if isinstance(template, dict):
        return type(template)(
            **{name: fill(item, values, caches) for name, item in template.items()}
        )
    if is_cache(template):
        cache = copy.copy(template)
        cache.layers = [new_layer(state, values) for state in template.layers]
        return cache
    return template


def new_layer(state: LayerState, values: Sequence[Any]) -> Any:
    """A layer of a cache in the state ``state``."""
    layer = copy.copy(state.layer)
    for name, template in state.attributes.items():
        setattr(layer, name, fill(template, values, ()))
    return layer
