"""The code in files, and the bounds on paper."""

from __future__ import annotations

import json

import pytest
import torch

from bench import roofline
from fp4compile.codegen import SUMMARY_FILE, codegen
from fp4compile.commands import codegen as command
from fp4compile.errors import CompileError


def test_files(layer, int8_operand, tmp_path):
    inputs = (int8_operand(9, 64), torch.rand(9, 1))
    (kernel,) = codegen(layer(32, 64), inputs, "sm_90", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    texts = {f"{kernel.file}.{kind}" for kind in ("ttgir", "ptx", "sass", "cubin")}
    assert names == {"graph0.py", SUMMARY_FILE, *texts}
    (written,) = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert written["registers"] == kernel.registers > 0
    assert "IMMA" in (tmp_path / "out" / f"{kernel.file}.sass").read_text()


def test_a_wrong_target_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises(CompileError, match="sm_120"):
        command.command("no such model", "sm_1", tmp_path)


def test_bounds():
    bounds = list(roofline.run(["sm_90"], rows=(1, 4096)))
    assert {b.limit for b in bounds if b.M == 1} == {"memory"}
    assert all(b.seconds < b.bfloat16_seconds for b in bounds)
    assert all(b.waves > 0 for b in bounds)
    assert len(roofline.markdown(bounds).splitlines()) == 2 + len(bounds)
