"""What generated GPU code says of itself, and which targets serve which kinds of GEMM."""

from __future__ import annotations

import pytest
import torch

from fp4compile.checkup import _served
from fp4compile.lowering.code import calls_in
from fp4compile.lowering.gpus import GPUS
from fp4compile.lowering.serves import KINDS, services

# Blocks of 6-bit codes have a kernel on CPUs only.
UNSERVED = {"w6a6, best (blocks of 32)"}
NATIVE = {"sm_100": "triton_scaled", "sm_120": "triton_scaled", "gfx950": "triton_scaled"}


def test_kernels_and_what_they_read(layer, int8_operand):
    from fp4compile.lowering.testing import compile_for

    linear, inputs = layer(70, 64), (int8_operand(5, 64), torch.rand(5, 1))

    def run(operand, scale):
        return torch.nn.functional.silu(linear(operand, scale)), scale.sum()

    (graph,) = compile_for(run, inputs, GPUS["sm_90"], dynamic=True)
    _, calls = calls_in(graph.source)
    (gemm,) = [call for call in calls if call.kernel == "triton_int8"]
    assert gemm.problem.startswith("linear N=70 K=64 int8")
    assert len(gemm.inputs) >= 4  # operand and its scale, codes and theirs
    assert gemm.epilogue == ("silu",)
    assert {call.kernel for call in calls} == {"triton_int8", "inductor"}


@pytest.mark.parametrize("name", GPUS)
def test_every_kind_is_served_on_every_gpu(name):
    found = {service.kind: service.target for service in services(name)}
    assert found.keys() == KINDS.keys()
    assert {kind for kind, target in found.items() if target is None} == UNSERVED
    assert found["w4a4"] == NATIVE.get(name, "triton_int8")
    assert found["w4a8 in e4m3"] == {
        "sm_80": "triton_float",
        "sm_100": "triton_scaled",
        "gfx950": "triton_scaled",
    }.get(name, "triton_float8")


def test_what_is_not_served_is_told_with_the_reason():
    served = [service for service in services("sm_75") if service.kind not in UNSERVED]
    checks = _served(served, " on sm_75")
    assert all("sm_75 was not tried" in check.fix for check in checks)
    assert checks[0].name == "kernel for w4a4 on sm_75"
