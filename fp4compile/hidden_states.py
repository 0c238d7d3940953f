"""What batches hold between two segments of the network: in memory up to a bound, then on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class HiddenStates:
    """Values by batch, on the CPU. At most ``limit`` bytes of them are in memory (None: all);
    the other batches are in one file each of ``folder`` (None: a temporary one). Leaving the
    context removes them.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit = limit
        self.spilled = 0
        self._folder = folder
        self._used = 0
        self._held: dict[int, list[Any]] = {}
        self._files: dict[int, Path] = {}
        self._layouts: dict[int, tuple[pytree.TreeSpec, list[torch.device | None]]] = {}

    def put(self, batch: int, values: Sequence[Any]) -> None:
        """Keep the values of ``batch`` until they are taken."""
        leaves, spec = pytree.tree_flatten(list(values))
        devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        self._layouts[batch] = spec, devices
        leaves = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        size = storage_bytes(leaves)
        if self.limit is None or self._used + size <= self.limit:
            self._held[batch] = leaves
            self._used += size
            return
        path = self._open_folder() / f"batch-{batch:06}.pt"
        # Storages are saved whole: strides stay, and with them every bit of what comes next.
        torch.save(leaves, path)
        self._files[batch] = path
        self.spilled += 1

    def take(self, batch: int) -> list[Any]:
        """What was put, on its device; nothing before the first :meth:`put`."""
        if batch not in self._layouts:
            return []
        spec, devices = self._layouts.pop(batch)
        if batch in self._files:
            path = self._files.pop(batch)
            leaves = torch.load(path, weights_only=True)
            path.unlink()
        else:
            leaves = self._held.pop(batch)
            self._used -= storage_bytes(leaves)
        moved = [
            leaf if device is None else leaf.to(device)
            for leaf, device in zip(leaves, devices, strict=True)
        ]
        values: list[Any] = pytree.tree_unflatten(moved, spec)
        return values

    def __enter__(self) -> HiddenStates:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # a killed run's
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self.spilled:
            shutil.rmtree(self._open_folder(), ignore_errors=True)

    def _open_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fp4compile-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder


def storage_bytes(values: Sequence[Any]) -> int:
    """Memory of all tensors among ``values``; what shares a storage counts once."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
