"""Decisions of a calibration on disk as they are made, so that a killed run can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fp4compile import qparams
from fp4compile.batches import Batch
from fp4compile.errors import CheckpointError
from fp4compile.qparams import SiteQParams

RUN_FILE = "run.json"
# Evenly spaced elements of every parameter that enter its digest one by one; all enter its sum.
DIGEST_ELEMENTS = 4096
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DECISION_TYPES: list[Any] = [
    kind for kind in vars(qparams).values() if dataclasses.is_dataclass(kind)
]

Decisions = Mapping[str, SiteQParams]


@dataclass(frozen=True)
class Checkpoint:
    """One file of decisions per key in ``folder`` (None: nothing is kept); ``found`` are those
    of the interrupted run.
    """

    folder: Path | None = None
    found: Mapping[str, Decisions] = field(default_factory=dict)

    def add(self, key: str, decisions: Decisions) -> None:
        """Write what was decided, whole or not at all."""
        if self.folder is not None:
            partial = self.folder / f"{key}.partial"
            torch.save(dict(decisions), partial)
            _publish(partial, self.folder / f"{key}.pt")


def open_checkpoint(folder: Path | None, run: Mapping[str, str]) -> Checkpoint:
    """The checkpoint of ``run`` in ``folder``, new or begun.

    Raises:
        CheckpointError: the folder is that of another run, or a file cannot be read.
    """
    if folder is None:
        return Checkpoint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_run(folder, run)
    except OSError as error:
        raise CheckpointError(
            f"calibration_dir={str(folder)!r} cannot be used: {error}; give a writable directory"
        ) from error
    return Checkpoint(folder, {path.stem: _read(path) for path in sorted(folder.glob("*.pt"))})


def _check_run(folder: Path, run: Mapping[str, str]) -> None:
    path = folder / RUN_FILE
    if not path.exists():
        if any(folder.glob("*.pt")):
            raise CheckpointError(f"{folder} has decisions but no {RUN_FILE}; give another one")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(run, indent=1))
        _publish(partial, path)
        return
    try:
        begun = dict(json.loads(path.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give another directory") from error
    differing = [
        f"{key} was {begun.get(key)!r} and is {run.get(key)!r}"
        for key in {**begun, **run}
        if begun.get(key) != run.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"calibration_dir={str(folder)!r} holds another run: {'; '.join(differing)}; "
            "give another directory"
        )


def _publish(partial: Path, path: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(path: Path) -> Decisions:
    try:
        with torch.serialization.safe_globals(DECISION_TYPES):
            found: Decisions = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises a dozen types; all mean the same to a user
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__} {error}; delete it to decide its "
            "sites again"
        ) from error
    return found


def fingerprint(
    model: nn.Module, sites: Sequence[str], batches: Sequence[Batch], options: Mapping[str, Any]
) -> dict[str, str]:
    """What a run's result depends on: the options as text, digests of everything large."""
    parameters = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {
        "fp4compile": version("fp4compile"),
        "torch": str(torch.__version__),
        **{name: str(value) for name, value in options.items()},
        "sites": _digest(name.encode() for name in sites),
        "calib_data": _digest(_described(leaf) for leaf in pytree.tree_leaves(list(batches))),
        "parameters": _digest(
            name.encode() + _sketch(parameter) for name, parameter in parameters.items()
        ),
    }


def _digest(parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()[:16]


def _described(leaf: Any) -> bytes:
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode()
    return f"{leaf.dtype} {tuple(leaf.shape)}".encode() + _raw(leaf)


def _sketch(tensor: Tensor) -> bytes:
    """Dtype, shape, some elements, and the exact sum of all elements' bits: one fast pass."""
    bits = tensor.detach().reshape(-1).view(BITS[tensor.itemsize])
    total = int(bits.sum(dtype=torch.int64))
    some = bits[:: max(1, bits.numel() // DIGEST_ELEMENTS)]
    return f"{tensor.dtype} {tuple(tensor.shape)} {total}".encode() + _raw(some)


def _raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
