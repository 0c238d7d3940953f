"""torchao's two ways to quantize reach FP4 weights, with the numbers of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile.errors import (
    AlreadyQuantizedError,
    CalibrationDataError,
    MissingDependencyError,
    SelectionError,
    SpecError,
)
from fp4compile.integrations.serialize import fp4_parameters
from fp4compile.tensor import FP4Tensor

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
W4A4 = fp4compile.QuantSpec.preset("w4a4")
BLOCK = fp4compile.TensorSpec(4, ("e2m1",), "block", block_size=16)


def data() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(64, 32)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return NormThenLinears().eval()


def quantize_(model: nn.Module, *args, **options) -> None:
    from torchao.quantization import quantize_

    quantize_(model, *args, **options)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        ("w4a16", "minmax"),
        ("w4a4", "fpq"),
        ("w4a8", "best"),
        ("w6a6", "minmax"),
        ("w8a8", "minmax"),
    ],
)
def test_every_linear_gets_an_fp4_weight(model, spec, method):
    full = model(data())
    quantize_(model, fp4compile.FP4Config(spec, method))
    weights = fp4_parameters(model)
    assert set(weights) == {"gate.weight", "up.weight", "down.weight"}
    for weight in weights.values():
        assert weight.exponent_shift is None
        assert weight.granularity == ("tensor" if spec == "w4a16" else "token")
    error = (model(data()) - full).detach().square().mean() / full.detach().square().mean()
    assert 0 < float(error) < {"w4a16": 0.05, "w4a8": 0.06, "w4a4": 0.2}.get(spec, 0.02)


def test_dynamic_minmax_is_that_of_quantize(model):
    from copy import deepcopy

    other = deepcopy(model)
    quantize_(model, fp4compile.FP4Config("w4a4", "minmax"))
    fp4compile.quantize(other, [data()], W4A4.per_token(), method="minmax", progress=False)
    assert torch.equal(model(data()), other(data()))


def test_specs_and_filters(model):
    spec = fp4compile.QuantSpec(BLOCK, None, BLOCK)
    config = fp4compile.FP4Config(spec, "best")
    quantize_(model, config, filter_fn=lambda module, name: name == "up")
    assert set(fp4_parameters(model)) == {"up.weight"}
    assert model.up.weight.block_size == 16
    llama = tiny_llama(layers=1)
    quantize_(
        llama,
        fp4compile.FP4Config("w4a16", "minmax"),
        filter_fn=lambda module, name: isinstance(module, nn.Embedding),
    )
    assert isinstance(llama.model.embed_tokens.weight, FP4Tensor)
    assert llama(tokens()).logits.isfinite().all()


def test_what_needs_data_or_has_no_meaning_is_refused(model):
    with pytest.raises(SpecError, match="no calibration data"):
        fp4compile.FP4Config(W4A4)
    with pytest.raises(SpecError, match="no calibration data"):
        fp4compile.FP4Config(fp4compile.QuantSpec(BLOCK, BLOCK, None))
    with pytest.raises(SpecError, match="no block scales"):
        fp4compile.FP4Config(fp4compile.QuantSpec(BLOCK, None, BLOCK))
    with pytest.raises(SpecError, match="unknown method"):
        fp4compile.FP4Config(method="magic")
    with pytest.raises(SelectionError, match="LayerNorm"):
        quantize_(
            model,
            fp4compile.FP4Config(),
            filter_fn=lambda module, name: isinstance(module, nn.LayerNorm),
        )
    quantize_(model, fp4compile.FP4Config("w4a16", "minmax"))
    with pytest.raises(AlreadyQuantizedError):
        quantize_(model, fp4compile.FP4Config("w4a16", "minmax"))


def exported(model: nn.Module) -> nn.Module:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (data(),), dynamic_shapes=({0: batch},)).module()


def pt2e(model: nn.Module, quantizer, *batches: torch.Tensor) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(exported(model), quantizer)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


@pytest.mark.parametrize(
    ("spec", "method"),
    [("w4a4", "minmax"), ("w4a4", "fpq"), (W4A4.per_token(), "best")],
    ids=["minmax", "fpq", "best"],
)
def test_pt2e_decides_as_quantize_does(model, spec, method):
    converted = pt2e(model, fp4compile.FP4Quantizer(spec, method), data())
    fp4compile.quantize(model, [data()], spec, method=method, progress=False)
    weights, expected = fp4_parameters(converted), fp4_parameters(model)
    assert len(weights) == len(expected) == 3
    # Shifts that quantize folds into a producer stay at run time here: the product is the same.
    assert torch.equal(converted(data()[:9]), model(data()[:9]))


def test_a_converted_model_compiles(model):
    converted = pt2e(model, fp4compile.FP4Quantizer("w4a4", "minmax"), data())
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    with torch.no_grad():
        through_aot = aot_autograd(fw_compiler=backend)
        y = torch.compile(converted, backend=through_aot, fullgraph=True)(data())
    assert torch.equal(y, converted(data()))
    assert seen.count("fp4.linear.default") == 3
    assert not [name for name in seen if "aten.mm" in name or "aten.addmm" in name]


def test_pt2e_without_data_or_linears_is_refused(model):
    with pytest.raises(CalibrationDataError, match="call the prepared model"):
        pt2e(model, fp4compile.FP4Quantizer())
    with pytest.raises(SelectionError, match=r"no aten\.linear"):
        pt2e(nn.LayerNorm(32), fp4compile.FP4Quantizer())
    with pytest.raises(SpecError):
        fp4compile.FP4Quantizer("w3a3")


def test_torchao_is_imported_when_it_is_needed(monkeypatch):
    code = "import sys, fp4compile; assert 'torchao' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "fp4compile.integrations.pt2e", None)
    with pytest.raises(MissingDependencyError, match="needs torchao: pip install"):
        _ = fp4compile.FP4Quantizer
    with pytest.raises(AttributeError, match="no attribute 'FP5Config'"):
        _ = fp4compile.FP5Config
