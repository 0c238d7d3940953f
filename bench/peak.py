"""What this CPU's int8 multiply-add unit does at best, measured by a loop in registers."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.c")
FLAGS = ("-O2", "-mavx512f", "-fopenmp", "-shared", "-fPIC")
# A few milliseconds.
STEPS = 1 << 19


def peak_call(threads: int) -> tuple[Callable[[], object], int] | None:
    """A call that only multiplies and adds int8 (``vpdpbusd``), and how many operations it is; None
    on a CPU without AVX512-VNNI.
    """
    if not (torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported()):
        return None
    run = _library().run
    run.restype, run.argtypes = ctypes.c_int64, (ctypes.c_int64, ctypes.c_int)
    call = partial(run, STEPS, threads)
    return call, call()


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "peak.so"
        subprocess.run(["gcc", *FLAGS, str(SOURCE), "-o", str(made)], check=True)
        return ctypes.CDLL(str(made))
