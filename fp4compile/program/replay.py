"""Steps that differ in small inputs only: their kernels are recorded once and called again.

A decode step on a static cache finds weights, cache and buffers where the step before found them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fp4compile.program.values import Flattened, InputTensor

logger = logging.getLogger(__name__)

# Elements that are copied into and out of every step; bytes of the buffers that a recording keeps.
MAX_COPIED, MAX_KEPT = 1 << 20, 64 << 20

Evaluate = Callable[[Sequence[Tensor]], list[Any]]


class Recording(Protocol):
    """Kernel calls, recorded while it is entered; ``fp4compile.lowering.Recording`` is one."""

    tensors: list[Tensor]
    obstacle: str | None

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def replay(self) -> Callable[[], None]: ...


class Replays:
    """Calls ``evaluate``, or repeats its kernels where only small inputs have changed.

    ``weights``: tensors that others keep where they are.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        record: Callable[[], Recording] | None,
        weights: Iterable[Tensor],
    ) -> None:
        self._evaluate, self._record = evaluate, record
        self._weights = frozenset(map(_memory, weights))
        self._last: Place | None = None
        self._taped: Taped | None = None

    @property
    def taped(self) -> bool:
        """Whether a step is recorded."""
        return self._taped is not None

    def recorded(self, flat: Flattened) -> Taped | None:
        """The step on the caches of ``flat``, with inputs of the same sizes, if it is recorded."""
        taped = self._taped  # once: another thread may call the program too
        return taped if taped is not None and taped.place.is_of(flat) else None

    def __call__(self, flat: Flattened) -> list[Any]:
        """The values that ``evaluate`` returns for the tensors of ``flat``."""
        if self._record is None or not flat.flat_caches:
            return self._evaluate(flat.tensors)
        taped = self.recorded(flat)
        if taped is not None:
            return taped(flat)
        # Prefill comes once to a place, decode again and again.
        if self._last is not None and self._last.is_of(flat):
            return self._recorded(flat, self._record)
        self._last = Place(flat)
        return self._evaluate(flat.tensors)

    def _recorded(self, flat: Flattened, record: Callable[[], Recording]) -> list[Any]:
        own = [
            tensor if index in flat.cached else tensor.clone()
            for index, tensor in enumerate(flat.tensors)
        ]
        with record() as recording:
            results = self._evaluate(own)
        caches = {_memory(own[index]) for index in flat.cached}
        elsewhere = caches | self._weights
        kept = [each for each in recording.tensors if _memory(each) not in elsewhere]
        templates = [_template(result, own) for result in results]
        obstacle = recording.obstacle or _obstacle(flat, own, templates, kept, caches)
        for index in flat.uncached:
            flat.tensors[index].copy_(own[index])  # what is written is the caller's
        if obstacle is None:
            self._taped = Taped(flat, own, templates, recording.replay(), kept)
        else:
            logger.info("steps run region by region: %s", obstacle)
            self._record = None
        return [_value(template, flat.tensors) for template in templates]


class Place:
    """The caches of a call, and the sizes of its other tensors."""

    def __init__(self, flat: Flattened) -> None:
        # Not kept alive: a cache that nobody needs any more is not needed here.
        self._caches = tuple(map(weakref.ref, flat.flat_caches))
        self._shapes = _shapes(flat)

    def is_of(self, flat: Flattened) -> bool:
        """Whether the tensors of ``flat`` are where those of this place are."""
        return (
            len(self._caches) == len(flat.flat_caches)
            and all(a() is b for a, b in zip(self._caches, flat.flat_caches, strict=True))
            and self._shapes == _shapes(flat)
        )


class Taped:
    """A recorded call: tensors in, kernels, results out."""

    def __init__(
        self,
        flat: Flattened,
        own: list[Tensor],
        templates: list[Any],
        replay: Callable[[], None],
        kept: list[Tensor],
    ) -> None:
        self.place = Place(flat)
        self._copied = [(index, own[index]) for index in flat.uncached]
        self._templates, self._replay, self._kept = templates, replay, kept

    def __call__(self, flat: Flattened) -> list[Any]:
        for index, own in self._copied:
            own.copy_(flat.tensors[index])
        self._replay()
        return [_value(template, flat.tensors) for template in self._templates]


def _shapes(flat: Flattened) -> list[Any]:
    return [flat.tensors[index].shape for index in flat.uncached]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _template(result: Any, own: Sequence[Tensor]) -> Any:
    index = next((index for index, tensor in enumerate(own) if tensor is result), None)
    return result if index is None else InputTensor(index)


def _value(template: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(template, InputTensor):
        return tensors[template.index]
    # The next step writes there again.
    return template.clone() if isinstance(template, Tensor) else template


def _obstacle(
    flat: Flattened,
    own: Sequence[Tensor],
    templates: Sequence[Any],
    kept: Sequence[Tensor],
    caches: set[int],
) -> str | None:
    """Why a recorded call cannot stand for the next one, or None."""
    if any(not torch.equal(own[index], flat.tensors[index]) for index in flat.uncached):
        return "an input is written"
    made = [template for template in templates if isinstance(template, Tensor)]
    if any(_memory(result) in caches for result in made):
        return "a result is a part of a cache"
    if sum(each.numel() for each in [*made, *(own[i] for i in flat.uncached)]) > MAX_COPIED:
        return "inputs and results are too large to be copied"
    buffers = {_memory(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    return "buffers are too large to be kept" if sum(buffers.values()) > MAX_KEPT else None
