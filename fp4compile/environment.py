"""What this machine and its packages are: facts for ``doctor``, and beside every measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

# Instruction sets that a kernel of ours or of oneDNN makes use of, as torch names them; NEON is any
# 64-bit ARM's.
CPU_FEATURES = (
    "avx2",
    "fma3",
    "avx_vnni",
    "avx512_f",
    "avx512_bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "neon",
)
PACKAGES = ("torch", "fp4compile", "transformers", "triton", "datasets", "lm-eval", "torchao")
# What changes how fast things are, or which kernel is taken.
VARIABLES = (
    "OMP_NUM_THREADS",
    "FP4COMPILE_CPU_TARGET",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_FREEZING",
    "LD_PRELOAD",
)
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Machine:
    """``cpu_features`` of :data:`CPU_FEATURES`; ``caches`` as the kernel tells them (``"L2"`` to
    ``"1024K"``); ``cores`` that this process may use; ``memory`` in bytes; ``versions`` of the
    packages that are installed; ``variables`` of the environment that are set.
    """

    cpu: str
    cpu_features: tuple[str, ...]
    caches: Mapping[str, str]
    cores: int
    threads: int
    memory: int
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: Mapping[str, str]
    variables: Mapping[str, str]


def describe_machine() -> Machine:
    """The machine that this process runs on; measures nothing."""
    arm = platform.machine() in ("aarch64", "arm64")
    present = {**torch.cpu.get_capabilities(), "neon": arm}
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Machine(
        cpu=_cpu_name(),
        cpu_features=tuple(name for name in CPU_FEATURES if present.get(name)),
        caches=_caches(),
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
        gpus=tuple(torch.cuda.get_device_name(index) for index in gpus),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=installed_versions(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def installed_versions() -> dict[str, str]:
    """Version by package, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # absence is the answer
    return found


def _usable_cores() -> int:
    """Those that this process may run on; macOS and Windows do not tell, so all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _cpu_name() -> str:
    if CPUINFO.is_file():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Data and unified caches of the first core; none where the system does not tell."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            level = (index / "level").read_text().strip()
            found[f"L{level}"] = (index / "size").read_text().strip()
    return found
