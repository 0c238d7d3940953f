"""Which targets serve which kinds of GEMM on this machine, without compiling anything."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch

from fp4compile.lowering.config import config
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import targets_of

_EXAMPLE = GemmProblem(
    N=4096,
    K=4096,
    weight_format="e2m1",
    operand_dtype=torch.int8,
    operand_scale="tensor",
    block_size=0,
    bias=False,
    out_dtype=torch.float32,
    operand_format="e2m1",
)
_BLOCKS = {"weight_format": "e2m1|e1m2", "operand_scale": "block", "block_size": 32}
_NO_SCALE = {"operand_scale": None, "operand_format": ""}
# What quantize is asked for -> how its GEMMs differ from the example.
KINDS: MappingProxyType[str, dict[str, object]] = MappingProxyType(
    {
        "w4a4": {},
        "w4a4, scale per token": {"operand_scale": "token"},
        "w4a4, best (blocks of 32)": _BLOCKS,
        "w4a4, stack of experts": {"experts": 8},
        "w4a8": {"operand_format": "e1m6"},
        "w4a8 in e4m3": {"operand_dtype": torch.bfloat16, "operand_format": "e4m3"},
        "w4a16 in bfloat16": {**_NO_SCALE, "operand_dtype": torch.bfloat16},
        "w4a16 in float32": {**_NO_SCALE, "operand_dtype": torch.float32},
        "w6a6": {"weight_format": "e2m3", "operand_format": "e2m3"},
        "w6a6, best (blocks of 32)": {**_BLOCKS, "weight_format": "e2m3|e1m4"},
        "w8a8": {"weight_format": "e1m6", "operand_format": "e1m6"},
        "w8a8 in e4m3": {
            "weight_format": "e4m3",
            "operand_dtype": torch.bfloat16,
            "operand_format": "e4m3",
        },
    }
)


@dataclass(frozen=True)
class Service:
    """``target`` serves GEMMs of ``kind`` (None: the eager reference, slow); ``declined`` says
    why those before it do not.
    """

    kind: str
    target: str | None
    declined: dict[str, str]


def services(architecture: str = "") -> list[Service]:
    """One per kind, as compiling would choose now on the CPU, or on a GPU (``"sm_90"``)."""
    place = {"device": "cuda", "architecture": architecture} if architecture else {}
    return [_service(kind, _problem({**changes, **place})) for kind, changes in KINDS.items()]


def _problem(changes: dict[str, object]) -> GemmProblem:
    return GemmProblem(**{**vars(_EXAMPLE), **changes})


def _service(kind: str, problem: GemmProblem) -> Service:
    declined: dict[str, str] = {}
    setting = config.setting(problem.device)
    forced = getattr(config, setting)
    for target in targets_of(problem.device):
        if forced not in (None, target.name):
            declined[target.name] = f"FP4COMPILE_{setting.upper()}={forced}"
            continue
        reason = target.supports(problem)
        if reason is None:
            return Service(kind, target.name, declined)
        declined[target.name] = reason
    return Service(kind, None, declined)
