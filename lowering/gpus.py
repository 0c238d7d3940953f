"""The table of GPUs that kernels are generated for, with what a datasheet says of each."""

from __future__ import annotations

from dataclasses import dataclass

from fp4compile.errors import CompileError

NVIDIA, AMD = "cuda", "hip"


@dataclass(frozen=True)
class Gpu:
    """One architecture, and the product whose datasheet stands for it.

    ``registers`` of 32 bits and resident ``threads`` are per multiprocessor; ``shared_memory`` is
    what one block may use, in bytes; ``bandwidth`` the memory's, in bytes/s; ``rates`` dense
    operations per second (a multiply-add is two) by operand type.
    """

    name: str
    vendor: str
    capability: int | str
    product: str
    multiprocessors: int
    shared_memory: int
    bandwidth: float
    rates: dict[str, float]
    threads: int = 2048
    registers: int = 65536
    warp: int = 32

    @property
    def major(self) -> int:
        """Compute capability's major number; 9 for CDNA, as its driver reports."""
        return self.capability // 10 if isinstance(self.capability, int) else 9

    @property
    def minor(self) -> int:
        """Compute capability's minor number."""
        return self.capability % 10 if isinstance(self.capability, int) else 4


_KB, _TB, _T = 1024, 1e12, 1e12

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "sm_80",
            NVIDIA,
            80,
            "A100 SXM 80 GB",
            multiprocessors=108,
            shared_memory=163 * _KB,
            bandwidth=2.039 * _TB,
            rates={"int8": 624 * _T, "bf16": 312 * _T},
        ),
        Gpu(
            "sm_89",
            NVIDIA,
            89,
            "L40S",
            multiprocessors=142,
            shared_memory=99 * _KB,
            threads=1536,
            bandwidth=0.864 * _TB,
            rates={"int8": 733 * _T, "bf16": 362 * _T, "fp8": 733 * _T},
        ),
        Gpu(
            "sm_90",
            NVIDIA,
            90,
            "H100 SXM",
            multiprocessors=132,
            shared_memory=227 * _KB,
            bandwidth=3.35 * _TB,
            rates={"int8": 1979 * _T, "bf16": 989 * _T, "fp8": 1979 * _T},
        ),
        Gpu(
            "sm_100",
            NVIDIA,
            100,
            "B200",
            multiprocessors=148,
            shared_memory=227 * _KB,
            bandwidth=8.0 * _TB,
            rates={"int8": 4500 * _T, "bf16": 2250 * _T, "fp8": 4500 * _T, "fp4": 9000 * _T},
        ),
        Gpu(
            "sm_120",
            NVIDIA,
            120,
            "RTX 5090",
            multiprocessors=170,
            shared_memory=99 * _KB,
            threads=1536,
            bandwidth=1.792 * _TB,
            rates={"int8": 838 * _T, "bf16": 210 * _T, "fp8": 419 * _T, "fp4": 1676 * _T},
        ),
        Gpu(
            "gfx942",
            AMD,
            "gfx942",
            "MI300X",
            multiprocessors=304,
            shared_memory=64 * _KB,
            registers=131072,
            warp=64,
            bandwidth=5.3 * _TB,
            rates={"int8": 2615 * _T, "bf16": 1307 * _T, "fp8": 2615 * _T},
        ),
        Gpu(
            "gfx950",
            AMD,
            "gfx950",
            "MI355X",
            multiprocessors=256,
            shared_memory=160 * _KB,
            registers=131072,
            warp=64,
            bandwidth=8.0 * _TB,
            rates={"int8": 5033 * _T, "bf16": 2517 * _T, "fp8": 5033 * _T, "fp4": 10066 * _T},
        ),
    )
}


def gpu_by_name(name: str) -> Gpu:
    """The GPU called ``name`` (``"sm_90"``).

    Raises:
        CompileError: the table has no such GPU.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise CompileError(
            f"unknown GPU target {name!r}; code is generated for {', '.join(GPUS)}"
        ) from None
