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
from fp4compile.tensor import FP4Tensor

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
    # Norm and quantize; gate with up; their product's rounding; down.
    product = "poi" if granularity == "tensor" else "per"
    assert launches(source) == Counter({"per": 1, "tem": 2}) + Counter([product])
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


NATIVE = fp4compile.QuantSpec(
    fp4compile.TensorSpec(4, ("e2m1",)),
    fp4compile.TensorSpec(4, ("e2m1",), granularity="token", exponent_shift=True),
    fp4compile.TensorSpec(4, ("e2m1",)),
)


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=96, num_attention_heads=4, **sizes)
    return BertModel(config).eval(), tokens(3, 9)


def vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = ViTConfig(image_size=16, patch_size=4, num_attention_heads=4, **sizes)
    return ViTModel(config).eval(), torch.randn(3, 3, 16, 16)


ENCODERS = {"bert": bert, "vit": vit}


def interpreted(model, inputs, name="sm_90"):
    """Equal to eager; the kernels that the module launches, and the targets of its GEMMs."""
    from fp4compile.lowering.testing import interpret_with_sources

    result, (source,) = interpret_with_sources(model, inputs, GPUS[name], dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(result, model(*inputs), rtol=1e-4, atol=1e-4)
    return launches(source), {choice.target for choice in SEEN}


def llama(layers, spec="w4a4"):
    made = tiny_llama(layers=layers)
    model = fp4compile.quantize(made, [tokens()], spec, method="minmax", progress=False)
    return model, lambda ids: model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "batch", "length"), [("sm_90", 2, 7), ("gfx942", 2, 7), ("sm_90", 1, 1)]
)
def test_kernels_of_a_decoder_layer(name, batch, length):
    counts, targets = interpreted(llama(1)[1], (tokens(batch, length),), name)
    # qkv, o with the residual, gate and up, down with the residual; the head.
    assert counts["tem"] == 4 + 1
    # Norm and quantize, twice and before the head.
    assert counts["per"] == 2 + 1
    # Rounding of attention's output and of silu(gate) * up; the rest is mask, rotary embedding and
    # what attention reads.
    assert counts["poi"] <= 2 + 6
    assert targets == {"triton_int8"}


@pytest.mark.slow
def test_llama_with_channels_in_order():
    model, logits = llama(2, NATIVE)
    for weight in model.parameters():
        if isinstance(weight, FP4Tensor):
            weight.exponent_shift = torch.arange(weight.reduction).remainder(4).to(torch.int8)
    assert fp4compile.order_channels(model) == {}
    counts, targets = interpreted(logits, (tokens(2, 7),), "sm_100")
    assert counts["tem"] == 2 * 4 + 1
    assert targets == {"triton_scaled"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"), [("bert", "sm_120"), ("vit", "sm_80"), ("vit", "gfx950")]
)
def test_encoders(family, name):
    model, inputs = ENCODERS[family]()
    fp4compile.quantize(model, [inputs], NATIVE, method="minmax", progress=False)
    counts, targets = interpreted(lambda x: model(x).last_hidden_state, (inputs,), name)
    # qkv, the attention's output and two linears of each layer; a ViT's patches.
    assert counts["tem"] == 2 * 4 + {"bert": 0, "vit": 1}[family]
    assert targets == {"triton_int8" if name == "sm_80" else "triton_scaled"}


# SmolLM2-135M: qkv, o, gate with up, down; each on one architecture and number of rows, as
# interpreting takes seconds per case.
SMOLLM2 = (
    ((576, 192, 192), 576, "sm_80", 40),
    ((576,), 576, "sm_90", 1),
    ((1536, 1536), 576, "sm_120", 1),
    ((576,), 1536, "sm_100", 40),
)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "K", "name", "M"), SMOLLM2, ids=str)
def test_layers_of_smollm2(rows, K, name, M):
    from gpu_layers import Siblings, e2m1

    from fp4compile.lowering.testing import compile_for, interpret

    layer, inputs = Siblings(rows, K, "e2m1", False), (e2m1(M, K), torch.rand(M, 1))
    for part, expected in zip(
        interpret(layer, inputs, GPUS[name], dynamic=M > 1), layer(*inputs), strict=True
    ):
        assert torch.equal(part, expected)
    (graph,) = compile_for(layer, inputs, GPUS[name], dynamic=M > 1)
    assert all(kernel.local_memory == 0 for kernel in graph.kernels)
