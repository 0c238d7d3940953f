"""What works here, what will be slow, and the fix: the checks of ``fp4compile doctor``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import nn

from fp4compile.api import quantize
from fp4compile.compile import compile_model, load_lowerings
from fp4compile.environment import Machine, describe_machine
from fp4compile.errors import CompileError

OK, SLOW, BROKEN = "ok", "slow", "broken"
# Package -> what does not work without it, and what installs it.
OPTIONAL = {
    "transformers": ("loading and saving models", "pip install 'fp4compile[hf]'"),
    "datasets": ("data from tables and the hub", "pip install 'fp4compile[eval]'"),
    "lm_eval": ("fp4compile eval --task", "pip install 'fp4compile[eval]'"),
}
SMALL_MEMORY = 4 << 30


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found; unless the verdict is "ok", what to do about it."""

    name: str
    found: str
    verdict: str = OK
    fix: str = ""


def examine(*, probe: bool = False) -> list[Check]:
    """All checks. With ``probe`` a layer is also quantized, compiled and compared with eager."""
    machine = describe_machine()
    checks = [check for run in CHECKS for check in run(machine)]
    return [*checks, _probe()] if probe else checks


def _system(machine: Machine) -> list[Check]:
    caches = ", ".join(f"{level} {size}" for level, size in machine.caches.items())
    return [
        Check("system", f"{machine.system}, Python {machine.python}"),
        Check("cpu", f"{machine.cpu}, {_cores(machine)}{caches and f'; {caches}'}"),
        Check("gpu", ", ".join(machine.gpus) or "none"),
    ]


def _cores(machine: Machine) -> str:
    return "1 core" if machine.cores == 1 else f"{machine.cores} cores"


def _instructions(machine: Machine) -> list[Check]:
    found = ", ".join(machine.cpu_features) or "none of those that kernels use"
    if {"avx512_vnni", "neon"} & {*machine.cpu_features}:
        return [Check("instructions", found)]
    fastest = "avx2" if "avx2" in machine.cpu_features else "portable C++"
    fix = f"{fastest} kernels are used; a CPU with AVX512-VNNI is faster"
    return [Check("instructions", found, SLOW, fix)]


def _threads(machine: Machine) -> list[Check]:
    found = f"{machine.threads} of {_cores(machine)}"
    if machine.threads == machine.cores:
        return [Check("threads", found)]
    if machine.threads > machine.cores:
        fix = f"more threads than cores wait for each other: OMP_NUM_THREADS={machine.cores}"
    else:
        fix = f"to use all: OMP_NUM_THREADS={machine.cores} or torch.set_num_threads"
    return [Check("threads", found, SLOW, fix)]


def _memory(machine: Machine) -> list[Check]:
    available = psutil.virtual_memory().available
    found = f"{available / 2**30:.1f} GiB of {machine.memory / 2**30:.1f} GiB available"
    if available >= SMALL_MEMORY:
        return [Check("memory", found)]
    return [Check("memory", found, SLOW, "close other programs, or quantize with --max-memory")]


def _variables(machine: Machine) -> list[Check]:
    return [Check(name, value) for name, value in machine.variables.items()]


def _torch(machine: Machine) -> list[Check]:
    found = machine.versions["torch"]
    try:
        load_lowerings()
    except CompileError as error:
        return [Check("torch", found, BROKEN, str(error))]
    return [Check("torch", found), _compiler()]


def _compiler() -> Check:
    try:
        command = load_lowerings().inductor.cpp_compiler()
    except CompileError as error:
        return Check("c++ compiler", "none", BROKEN, str(error))
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        fix = f"`{command} --version` fails: {said.stderr.strip()}; install gcc/g++ or set CXX"
        return Check("c++ compiler", command, BROKEN, fix)
    first = said.stdout.partition("\n")[0]
    return Check("c++ compiler", f"{shutil.which(command) or command}: {first}")


def _packages(machine: Machine) -> list[Check]:
    checks = []
    for module, (use, fix) in OPTIONAL.items():
        found = machine.versions.get(module.replace("_", "-"))
        if found is not None or find_spec(module) is not None:
            checks.append(Check(module, found or "installed"))
        else:
            checks.append(Check(module, f"not installed; only needed for {use}", OK, fix))
    return checks


def _kernels(machine: Machine) -> list[Check]:
    try:
        lowering = load_lowerings()
    except CompileError:
        return []  # the check of torch says it
    gpus = sorted({lowering.architecture(gpu) for gpu in range(len(machine.gpus))})
    checks = _served(lowering.services(), "")
    for architecture in gpus:
        checks += _served(lowering.services(architecture), f" on {architecture}")
    return checks


def _served(services: Sequence[Any], where: str) -> list[Check]:
    checks = []
    for service in services:
        name, why = f"kernel for {service.kind}{where}", _reasons(service.declined)
        if service.target is None:
            checks.append(Check(name, "none", SLOW, f"runs on the eager reference ({why})"))
        else:
            checks.append(Check(name, f"{service.target}{why and f' ({why})'}"))
    return checks


def _reasons(declined: Mapping[str, str]) -> str:
    """Every reason once, with the targets that give it."""
    targets: dict[str, list[str]] = {}
    for target, reason in declined.items():
        targets.setdefault(reason, []).append(target)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in targets.items())


def _probe() -> Check:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    with torch.random.fork_rng():
        model = quantize(nn.Sequential(nn.Linear(64, 32)), [x], method="minmax", progress=False)
    expected = model(x)
    try:
        got = compile_model(model)(x)
    except Exception as error:  # whatever a compiler can fail with is what the probe looks for
        reason = str(error).strip().splitlines()[0]
        fix = f"{type(error).__name__}: {reason}; see docs/troubleshooting.md"
        return Check("compiling a layer", "fails", BROKEN, fix)
    if not torch.equal(got, expected):
        fix = "compiled and eager results differ: please report it with this output"
        return Check("compiling a layer", "wrong", BROKEN, fix)
    return Check("compiling a layer", "works, bit for bit the eager result")


CHECKS: Sequence[Callable[[Machine], list[Check]]] = (
    _system,
    _instructions,
    _threads,
    _memory,
    _torch,
    _packages,
    _variables,
    _kernels,
)
