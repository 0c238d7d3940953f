"""Nested arguments and results as flat tensors plus a template, key-value caches included."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor, nn

# What may stand between tensors; equal ones make equal programs.
CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class NotFlat(Exception):
    """A value that programs cannot take; the message says which."""


@dataclass(frozen=True)
class InputTensor:
    """Stands for the tensor at ``index`` of those that the caller passed in."""

    index: int


# Attributes of an initialized layer that repeat a size of its keys, and which.
_SIZES = {"batch_size": 0, "max_cache_len": 2}


def cache_types() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """(caches, their layers) that are known to consist of tensors and constants."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None:
        return (), ()
    return (module.StaticCache, module.DynamicCache), (module.StaticLayer, module.DynamicLayer)


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a key-value cache of transformers."""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def check_cache(cache: Any) -> None:
    """Raises NotFlat where ``cache`` keeps more than tensors and constants."""
    caches, layers = cache_types()
    if type(cache) not in caches or getattr(cache, "offloading", False):
        raise NotFlat(f"a {type(cache).__name__} is none of {[kind.__name__ for kind in caches]}")
    for layer in cache.layers:
        if type(layer) not in layers:
            raise NotFlat(f"a cache with a {type(layer).__name__}")


class Key:
    """A long part of a key that is hashed once."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = tuple(parts)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._parts == other._parts)


@dataclass(frozen=True)
class FlatCache:
    """Tensors and key of a cache in one state: its layers and their attributes, kept as objects so
    that their addresses are not used again.
    """

    cache: Callable[[], Any]
    objects: list[Any]
    addresses: list[int]
    tensors: list[Tensor]
    key: Key

    def holds(self, cache: Any) -> bool:
        return cache is self.cache() and list(map(id, _objects(cache))) == self.addresses


def _objects(cache: Any) -> Iterator[Any]:
    """Its layers and their attributes: hundreds, and every step looks at them."""
    return chain(cache.layers, *(vars(layer).values() for layer in cache.layers))


class CacheMemo:
    """The cache of the last call: a decode step finds that of the step before it, with hundreds of
    attributes that are still the same.
    """

    def __init__(self) -> None:
        self._last: FlatCache | None = None

    def flat(self, cache: Any) -> FlatCache:
        last = self._last  # once: another thread may call the model too
        if last is None or not last.holds(cache):
            check_cache(cache)
            # The memory of a cache that nobody needs any more is not kept.
            reference = weakref.ref(cache, self._forget)
            objects = list(_objects(cache))
            addresses = list(map(id, objects))
            last = self._last = FlatCache(reference, objects, addresses, *_flat_cache(cache))
        return last

    def _forget(self, reference: Any) -> None:
        if self._last is not None and self._last.cache is reference:
            self._last = None


class Flattened:
    """``tensors`` and ``caches`` of a call in order of appearance, and the ``key`` of the rest.

    ``flat_caches`` are the caches as they were flattened, the same objects as in the call before
    where nothing of a cache was replaced.
    """

    def __init__(self, value: Any, memo: CacheMemo | None = None) -> None:
        self._memo = memo or CacheMemo()
        self.tensors: list[Tensor] = []
        self.caches: list[Any] = []
        self.flat_caches: list[FlatCache] = []
        self.cached: set[int] = set()  # which of the tensors are in caches
        key: list[Any] = []
        self._add(value, key)
        self.key = tuple(key)
        # Which of the tensors are in no cache.
        self.uncached = [index for index in range(len(self.tensors)) if index not in self.cached]

    def with_tensors(self, tensors: list[Tensor]) -> Flattened:
        """The same with others in place of ``tensors``."""
        other = copy.copy(self)
        other.tensors = tensors
        return other

    def _add(self, value: Any, key: list[Any]) -> None:
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise NotFlat("an argument that requires a gradient")
            if value.device.type != "cpu":
                raise NotFlat(f"an argument on {value.device.type}")
            self.tensors.append(value)
            sizes = [size if size < 2 else -1 for size in value.shape]
            key.append((value.dtype, value.device, *sizes, _layout(value)))
        elif isinstance(value, CONSTANTS):
            # The type too: True == 1 == 1.0.
            key.append((type(value), value))
        elif type(value) in (tuple, list):
            key.append((type(value), len(value)))
            for item in value:
                self._add(item, key)
        elif isinstance(value, dict):
            key.append((type(value), tuple(value)))
            for item in value.values():
                self._add(item, key)
        elif is_cache(value):
            self._add_cache(value, key)
        else:
            raise NotFlat(f"an argument of type {type(value).__name__}")

    def _add_cache(self, cache: Any, key: list[Any]) -> None:
        self.caches.append(cache)
        flat = self._memo.flat(cache)
        self.flat_caches.append(flat)
        self.cached.update(range(len(self.tensors), len(self.tensors) + len(flat.tensors)))
        self.tensors.extend(flat.tensors)
        key.append(flat.key)


def _flat_cache(cache: Any) -> tuple[list[Tensor], Key]:
    """Tensors and key of a cache."""
    states = []
    for layer in cache.layers:
        states.append(dict(vars(layer)))
        for name in _SIZES if layer.is_initialized else ():
            states[-1].pop(name, None)
    flat = Flattened(states)
    fixed = [tuple(tensor.shape[dim] for dim in fixed_dims(tensor)) for tensor in flat.tensors]
    return flat.tensors, Key([type(cache), *flat.key, *fixed])


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """Which dimension lies inside of which, and whether without gaps; () if contiguous.

    Generated code reads an input by the strides that it was compiled for: the keys of a growing
    cache are those of the prompt, transposed, before the first step and contiguous after it.
    """
    if tensor.is_contiguous():
        return ()
    dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] != 1]
    order = sorted(dims, key=tensor.stride, reverse=True)
    dense = tensor.squeeze().permute([dims.index(dim) for dim in order]).is_contiguous()
    return (*order, int(dense))


def fixed_dims(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions of a cache's tensor that are the model's: heads and their channels.

    A symbol for them would be that of a batch that happens to be of the same size.
    """
    return (1, 3) if tensor.dim() == 4 else ()


def substitute(value: Any, replace: Callable[[Tensor], Tensor], caches: list[Any]) -> Any:
    """``value`` with every tensor replaced in the order of :class:`Flattened`.

    Caches are copied; the copies are appended to ``caches``.
    """
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, (tuple, list)):
        return type(value)(substitute(item, replace, caches) for item in value)
    if isinstance(value, dict):
        return {name: substitute(item, replace, caches) for name, item in value.items()}
    if is_cache(value):
        clone = copy.copy(value)
        clone.layers = [_substitute_layer(layer, replace) for layer in value.layers]
        caches.append(clone)
        return clone
    return value


def _substitute_layer(layer: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    clone = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(clone, name, replace(value))
    for name, dim in _SIZES.items() if clone.is_initialized else ():
        if hasattr(clone, name):
            setattr(clone, name, clone.keys.shape[dim])  # symbolic where the tensor is
    return clone


def initialize_caches(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Allocate static caches that wait for their first call.

    Inside a program their length would be a constant.
    """
    arguments: list[Any] = [*args, *kwargs.values()]
    for cache in filter(_waits, arguments):
        shape = module._get_static_cache_init_shape()
        batch = next((len(value) for value in arguments if isinstance(value, Tensor)), None)
        if shape is not None and batch is not None:
            cache.early_initialization(batch, *shape, module.dtype, module.device)


def _waits(cache: Any) -> bool:
    static = cache_types()[0][:1]
    return type(cache) in static and not all(layer.is_initialized for layer in cache.layers)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of ``module``'s forward that keywords may name too.

    Named by all, they make one kind of call of what some callers name and some do not.
    """
    parameters = list(signature(module.forward).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return ()
    named = takewhile(lambda each: each.kind is each.POSITIONAL_OR_KEYWORD, parameters)
    return tuple(parameter.name for parameter in named)
