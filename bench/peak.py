"""What this CPU's int8 multiply-add unit does at best, measured by a loop in registers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fp4compile.lowering.inductor import load_native

SOURCE = Path(__file__).with_name("peak.cpp")
# A few milliseconds.
STEPS = 1 << 19


def peak_call(threads: int) -> tuple[Callable[[], object], int] | None:
    """A call that only multiplies and adds int8, and how many operations it is: ``vpdpbusd`` on
    AVX512-VNNI, else ``vpmaddubsw`` and ``vpaddw``; None on a CPU without AVX2.
    """
    if not torch.cpu._is_avx2_supported():
        return None
    run = load_native(f"#define VNNI {int(has_vnni())}\n{SOURCE.read_text()}").run
    run.restype, run.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int)
    call = partial(run, STEPS, threads)
    return call, call()


def has_vnni() -> bool:
    """Whether this CPU has ``vpdpbusd`` for 64 bytes."""
    return torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()
