"""Several processes calibrate together: who takes which batches, and how statistics merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fp4compile.errors import CalibrationDataError
from fp4compile.observers import ActivationObserver, SampleObserver

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``size``. This class is a process on its own."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every ``size``-th item."""
        if len(items) < self.size:
            raise CalibrationDataError(
                f"{len(items)} calibration batches cannot be divided over {self.size} processes; "
                "give more or smaller batches, or start fewer processes"
            )
        return items[self.rank :: self.size]

    def merge(self, observer: ActivationObserver, owner: int) -> None:
        """Afterwards the observer of process ``owner`` has seen what all have seen; those of
        the others are spent.
        """

    def gathered(self, value: T) -> list[T]:
        """The values that all processes give, in order of rank."""
        return [value]

    def check_same(self, run: Mapping[str, str]) -> None:
        """Every process must have been given the same ``run``."""
        for rank, other in enumerate(self.gathered(run)):
            differing = sorted(key for key in run if run[key] != other[key])
            if differing:
                raise CalibrationDataError(
                    f"processes {self.rank} and {rank} differ in {', '.join(differing)}; give "
                    "every process the same model, options and calibration data: each takes its "
                    "part of the batches by itself"
                )

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, which alone calls it."""
        return make()


@dataclass(frozen=True)
class _ProcessGroup(Processes):
    group: Any = None

    def merge(self, observer: ActivationObserver, owner: int) -> None:
        self._reduce(observer.absmax.value, owner, dist.ReduceOp.MAX)
        observer.tokens = sum(self.gathered(observer.tokens))
        if observer.moment is not None:
            self._reduce(observer.moment.sum, owner, dist.ReduceOp.SUM)
            observer.moment.tokens = observer.tokens
        self._merge_samples(observer.sample, owner)

    def gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        made: list[Any] = self.gathered(make() if self.rank == 0 else None)
        return made[0]

    def _reduce(self, tensor: Tensor, owner: int, operation: Any) -> None:
        moved = tensor.to(self._device)
        dist.reduce(moved, self._global_rank(owner), operation, group=self.group)
        if self.rank == owner:
            tensor.copy_(moved)

    def _merge_samples(self, sample: SampleObserver, owner: int) -> None:
        """Only tokens that stay in the merged sample travel."""
        all_keys = self.gathered((sample.keys, sample.order))
        last = torch.cat([keys for keys, _ in all_keys]).sort().values[: sample.size][-1]
        if self.rank != owner:
            chosen = sample.rows[sample.keys <= last].to(self._device)
            dist.send(chosen, self._global_rank(owner), group=self.group)
            return
        for rank, (keys, order) in enumerate(all_keys):
            if rank != owner:
                stay = keys <= last
                rows = torch.empty(int(stay.sum()), sample.rows.shape[1], device=self._device)
                dist.recv(rows, self._global_rank(rank), group=self.group)
                sample.keep(keys[stay], order[stay], rows.to(sample.rows.device))

    @property
    def _device(self) -> torch.device:
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def processes_of(group: Any = None) -> Processes:
    """Those of ``group``, or of the default group where torch.distributed is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    if dist.get_world_size(group) == 1:
        return Processes()
    return _ProcessGroup(dist.get_rank(group), dist.get_world_size(group), group)
