"""Benchmarks of a user's model name its kernels; no time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn
from torch._dynamo.utils import counters

import fp4compile
from fp4compile.compile import compile_model
from fp4compile.errors import EvaluationError, Fp4CompileError, ReportError
from fp4compile.measure import RUNTIME, dequantized_copy, kind_of
from fp4compile.page import write_page
from fp4compile.timing import Benchmark


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.linear = nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(self.norm(x)))


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, Benchmark]:
    """By the portable target: it compiles fastest, and every machine has it."""
    torch.manual_seed(0)
    # Compiled before, as by a user: benchmark compiles for itself.
    model = compile_model(fp4compile.quantize(Block(), [torch.randn(16, 32)], progress=False))
    counters.clear()
    config = fp4compile.load_lowerings().config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "cpu_target", "cpp_portable")
        return model, fp4compile.benchmark(model, torch.randn(4, 32), repetitions=3)


def test_every_gemm_of_the_graph_is_found(measured: tuple[nn.Module, Benchmark]) -> None:
    ops = [op for op in measured[1].quantized.ops if op.kind == "FP4 GEMM"]
    assert [op.name.split("_")[2] for op in ops] == ["48x32"]
    assert [op.calls for op in ops] == [1]


def test_shares_add_up_and_the_first_op_dominates(measured: tuple[nn.Module, Benchmark]) -> None:
    _, result = measured
    for part in (result.quantized, result.baseline):
        assert part is not None
        assert sum(op.share for op in part.ops) == pytest.approx(1, abs=0.05)
        assert [op.seconds for op in part.ops] == sorted(
            (o.seconds for o in part.ops), reverse=True
        )
        assert part.seconds.low <= part.seconds.median <= part.seconds.high
        assert sum(part.kinds.values()) == pytest.approx(sum(op.share for op in part.ops))
    assert result.dominating is result.quantized.ops[0]
    assert result.dominating.name in result.summary()


def test_the_report_shows_the_speed(measured: tuple[nn.Module, Benchmark], tmp_path: Path) -> None:
    model, result = measured
    page = write_page(model.fp4_report, tmp_path / "report.html", [result])
    text = (tmp_path / "report.html").read_text()
    assert page.speed[0].label == "4 x 32"
    assert "times as fast as bfloat16" in text
    assert f"{result.speedup:.2f}</text>" in text
    with pytest.raises(ReportError, match="without a baseline"):
        write_page(model.fp4_report, tmp_path / "other.html", [replace(result, baseline=None)])


def test_what_is_no_benchmark_is_refused() -> None:
    with pytest.raises(EvaluationError, match="fp4compile bench --json"):
        Benchmark.from_dict({"name": "fp4"})


def test_the_baseline_has_no_fp4_kernel(measured: tuple[nn.Module, Benchmark]) -> None:
    baseline = measured[1].baseline
    assert baseline is not None
    assert "FP4 GEMM" not in baseline.kinds
    assert "GEMM in 16 or 32 bits" in baseline.kinds


def test_the_result_is_json_and_the_model_as_it_was(measured: tuple[nn.Module, Benchmark]) -> None:
    model, result = measured
    again = json.loads(json.dumps(result.to_dict()))
    assert again["inputs"] == {"argument 0": [4, 32]}
    assert again["speedup"] == result.speedup
    assert Benchmark.from_dict(again) == result
    assert model.fp4_report.sites
    assert not counters["graph_break"]


def test_a_dequantized_copy_computes_what_the_codes_mean() -> None:
    """Shifts that a producer absorbed are in its weights; 8 bits leave little else."""
    search = fp4compile.SearchOptions(rounding="nearest", rounds=1)
    model = fp4compile.quantize(
        tiny_llama(layers=1), [tokens()], "w8a8", search=search, progress=False
    )
    dense = dequantized_copy(model, torch.float32)
    expected, got = model(tokens()).logits, dense(tokens()).logits
    assert (got - expected).square().mean() < 2e-2 * expected.square().mean()
    assert any(site.shift_folded_into for site in model.fp4_report.sites)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("graph_3_fp4_linear_64x128_kernel", "FP4 GEMM"),
        ("graph_3_fp4_quantize_activation_64_kernel", "rounding of activations"),
        ("graph_1_cpp_fused__scaled_dot_product_mul_3", "fused element-wise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "GEMM in 16 or 32 bits"),
        ("mkldnn::_linear_pointwise", "GEMM in 16 or 32 bits"),
        ("fp4::linear", "other ops"),
        ("Torch-Compiled Region: 0/0", RUNTIME),
    ],
)
def test_kinds_of_work(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (Block, torch.randn(4, 32), "holds no FP4 weight"),
        (None, {"y": torch.randn(4, 32)}, "no argument"),
    ],
    ids=["not quantized", "wrong inputs"],
)
def test_mistakes_are_told(make, inputs, message, measured) -> None:
    model = measured[0] if make is None else make()
    with pytest.raises(Fp4CompileError, match=message):
        fp4compile.benchmark(model, inputs)


def test_there_must_be_something_to_repeat(measured: tuple[nn.Module, Benchmark]) -> None:
    with pytest.raises(EvaluationError, match="at least 1"):
        fp4compile.benchmark(measured[0], torch.randn(4, 32), repetitions=0)
