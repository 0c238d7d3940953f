"""Targets decline with a reason, the reason is recorded and logged, and a target can be forced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile import lowering
from fp4compile.errors import CompileError
from fp4compile.lowering.choice import SEEN, choose
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import CPU_TARGETS, cpp_amx, cpp_avx512

Make = Callable[..., Any]

PROBLEM = GemmProblem(
    N=8,
    K=8,
    weight_format="e2m1",
    operand_dtype=torch.int8,
    operand_scale="token",
    block_size=0,
    bias=False,
    out_dtype=torch.float32,
)


def test_the_reference_is_chosen_with_a_reason(
    compiled: Make, random_weight: Make, int8_operand: Make, caplog: pytest.LogCaptureFixture
) -> None:
    K = 2**17  # times 127 * 128 leaves int32
    weight = random_weight(2, K, "e1m6")

    def run(operand: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.fp4.linear(
            operand, scale, weight.packed, weight.scale, None, "e1m6", torch.float32
        )

    operand, scale = int8_operand(3, K), torch.rand(3, 1)
    with caplog.at_level(logging.INFO, logger="fp4compile.lowering"):
        assert torch.equal(compiled(run)(operand, scale), run(operand, scale))
    (choice,) = SEEN
    assert choice.target == "reference"
    assert "int32" in choice.reason
    assert choice.reason in caplog.text


def test_missing_flags_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert "avx512_vnni" in (cpp_avx512.TARGET.supports(PROBLEM) or "")
    chosen, choice = choose(PROBLEM, CPU_TARGETS)
    assert chosen is not None
    assert chosen.name == choice.target != "cpp_avx512"
    assert "avx512_vnni" in choice.reason


def test_tiles_need_the_systems_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*cpp_avx512.FLAGS[PROBLEM.route], "amx_tile", "amx_int8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True))
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    chosen, choice = choose(PROBLEM, CPU_TARGETS)
    assert chosen is cpp_avx512.TARGET
    assert "does not let" in choice.reason
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    assert choose(PROBLEM, CPU_TARGETS)[0] is cpp_amx.TARGET
    blocks = replace(PROBLEM, weight_format="e2m1|e1m2", operand_scale="block", block_size=32)
    assert choose(blocks, CPU_TARGETS)[0] is cpp_avx512.TARGET


def test_forced_reference() -> None:
    lowering.config.cpu_target = "reference"
    chosen, choice = choose(PROBLEM, CPU_TARGETS)
    assert chosen is None
    assert choice.is_reference
    assert "forced" in choice.reason


def test_unknown_target() -> None:
    lowering.config.cpu_target = "abacus"
    with pytest.raises(CompileError, match="cpp_portable"):
        choose(PROBLEM, CPU_TARGETS)
