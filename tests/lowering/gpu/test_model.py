"""Whole graphs as a GPU would run them: how many kernels, and what they compute."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens

import fp4compile
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.gpus import GPUS

GPU = GPUS["sm_90"]


def launches(source: str) -> Counter[str]:
    """Kernels that a module launches, by kind: tem (a GEMM with what is fused), per, red, poi."""
    return Counter(re.findall(r"^ +triton_(tem|per|red|poi)_\w+\.run\(", source, re.MULTILINE))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_quantization_is_fused(granularity):
    from fp4compile.lowering.testing import interpret_with_sources

    torch.manual_seed(0)
    spec = fp4compile.QuantSpec.preset("w4a4")
    spec = spec if granularity == "tensor" else spec.per_token()
    model, x = NormThenLinears(), torch.randn(6, 5, 32)
    fp4compile.quantize(model, [x], spec, method="minmax")
    result, (source,) = interpret_with_sources(model, (x,), GPU, dynamic=True)
    # Norm and quantize; gate, up and down. A static scale lets up's kernel end with the product,
    # its rounding and all; a token's maximum needs a kernel.
    assert launches(source) == {"per": 1 if granularity == "tensor" else 2, "tem": 3}
    assert "div_rn" in source
    torch.testing.assert_close(result, model(x), rtol=1e-4, atol=1e-4)
    assert {choice.target for choice in SEEN} == {"triton_int8"}


@pytest.mark.parametrize(
    ("format", "granularity"), [("e2m1", "token"), ("e3m0", "tensor"), ("e4m3", "token")]
)
def test_the_operand_is_exact(format, granularity):
    from fp4compile.lowering.testing import interpret

    x, scale = torch.randn(5, 48) * 3, torch.tensor(0.4 if granularity == "tensor" else 0.9)
    shift = torch.randint(0, 1 + (format == "e2m1"), (48,), dtype=torch.int8)

    def quantize(x, scale, shift):
        return torch.ops.fp4.quantize_activation(x, scale, shift, format, granularity)

    for fast, slow in zip(
        interpret(quantize, (x, scale, shift), GPU), quantize(x, scale, shift), strict=True
    ):
        assert torch.equal(fast, slow)


@pytest.mark.slow
def test_llama():
    from fp4compile.lowering.testing import interpret_with_sources

    model = fp4compile.quantize(tiny_llama(layers=2), [tokens()], "w4a4", method="minmax")
    ids = tokens(2, 7)

    def logits(ids):
        return model(ids, use_cache=False).logits

    result, (source,) = interpret_with_sources(logits, (ids,), GPU, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(result, logits(ids), rtol=1e-4, atol=1e-4)
    counts = launches(source)
    # q, k, v, o, gate, up and down of each layer, and the head.
    assert counts["tem"] == 2 * 7 + 1
    # The residual, norm and quantize, twice per layer and before the head.
    assert counts["per"] == 2 * 2 + 1
    assert {choice.target for choice in SEEN} == {"triton_int8"}
