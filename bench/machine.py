"""The machine that a result was measured on, with its bandwidth and peaks as measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.timing import Timing, interleave
from fp4compile.environment import Machine, describe_machine

# Larger than any last-level cache; and a GEMM large enough to be bound by arithmetic.
READ_FLOATS = 64 << 20
GEMM_SIZE = 2048
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Rate:
    """Per second: median, lowest and highest of the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, work: float, timing: Timing) -> Rate:
        return cls(work / timing.median, work / timing.high, work / timing.low)


@dataclass(frozen=True)
class MeasuredMachine:
    """``read_bandwidth`` in bytes per second, of ``torch.sum``; ``peaks`` in operations per second,
    of torch's own square GEMMs by dtype.
    """

    machine: Machine
    threads: int
    read_bandwidth: Rate
    peaks: dict[str, Rate]

    def to_json(self) -> dict[str, Any]:
        return {"name": "machine", **asdict(self)}


def measure_machine(
    threads: int,
    *,
    repetitions: int = 9,
    read_floats: int = READ_FLOATS,
    gemm_size: int = GEMM_SIZE,
) -> MeasuredMachine:
    """Describe this machine and measure its roofs, all of them in one interleaved run."""
    torch.set_num_threads(threads)
    buffer = torch.ones(read_floats)
    gemms = {str(dtype).removeprefix("torch."): _gemm(dtype, gemm_size) for dtype in DTYPES}
    timings = interleave({"read": buffer.sum, **gemms}, repetitions=repetitions)
    return MeasuredMachine(
        describe_machine(),
        threads,
        Rate.of(buffer.nbytes, timings["read"]),
        {name: Rate.of(2 * gemm_size**3, timings[name]) for name in gemms},
    )


def _gemm(dtype: torch.dtype, size: int) -> Callable[[], object]:
    if dtype == torch.int8:
        left = torch.randint(-128, 127, (size, size), dtype=dtype)
        right = torch.randint(-128, 127, (size, size), dtype=dtype)
        return lambda: torch._int_mm(left, right)
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return lambda: left @ right
