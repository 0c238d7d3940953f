"""Exported checkpoints mean, to the compressed-tensors library, what our weights mean."""

from __future__ import annotations

import json

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens
from safetensors.torch import load_file
from torch import nn

import fp4compile
from fp4compile.errors import InterchangeError
from fp4compile.integrations.serialize import fp4_parameters
from fp4compile.tensor import FP4Tensor

pytest.importorskip("compressed_tensors")
DATA = [tokens(seed=1)]
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"


def quantized(block_size: int, *, activation: bool) -> nn.Module:
    block = fp4compile.TensorSpec(4, ("e2m1",), "block", block_size=block_size)
    spec = fp4compile.QuantSpec(block, block if activation else None, None)
    return fp4compile.quantize(tiny_llama(layers=1), DATA, spec, method="minmax", progress=False)


def round_scales_to_powers_of_two(model: nn.Module, *, outer_only: bool) -> None:
    for weight in fp4_parameters(model).values():
        weight.weight_scale = torch.exp2(weight.weight_scale.log2().round())
        if not outer_only:
            weight.block_scale = weight.block_scale & 0x78 | 0x08  # exponents, none subnormal


def decompressed(folder, format: str) -> dict[str, torch.Tensor]:
    """Every quantized weight by the library's own code, from the files alone."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(content)
    (scheme,) = config.config_groups.values()
    state = load_file(folder / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(format)
    modules = [name.removesuffix(".weight_packed") for name in state if "weight_packed" in name]
    return {
        f"{module}.weight": compressor.decompress(
            {
                name.removeprefix(f"{module}."): tensor
                for name, tensor in state.items()
                if name.startswith(f"{module}.")
            },
            scheme,
        )["weight"]
        for module in modules
    }


def assert_means_the_same(model: nn.Module, folder, format: str, *, exact: bool) -> None:
    weights = decompressed(folder, format)
    assert weights.keys() == fp4_parameters(model).keys()
    for name, weight in weights.items():
        expected = model.get_parameter(name).dequantize().to(weight.dtype)
        if exact:
            assert torch.equal(weight, expected), name
        else:  # the library rounds to bfloat16
            torch.testing.assert_close(weight, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("activation", [False, True], ids=["w4a16", "w4a4"])
def test_nvfp4(activation, tmp_path):
    model = quantized(16, activation=activation)
    fp4compile.export_compressed_tensors(model, tmp_path)
    assert_means_the_same(model, tmp_path, NVFP4, exact=False)
    state = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.mlp.up_proj"
    weight = model.get_parameter(f"{prefix}.weight")
    assert torch.equal(state[f"{prefix}.weight_packed"], weight.packed_weight)
    assert torch.equal(state[f"{prefix}.weight_scale"].view(torch.uint8), weight.block_scale)
    assert (f"{prefix}.input_global_scale" in state) == activation
    # What is not quantized is there too, tied weights once.
    assert torch.equal(state["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert "lm_head.weight" not in state


def test_nvfp4_is_bit_exact_where_the_outer_scale_is_a_power_of_two(tmp_path):
    model = quantized(16, activation=False)
    round_scales_to_powers_of_two(model, outer_only=True)
    fp4compile.export_compressed_tensors(model, tmp_path)
    assert_means_the_same(model, tmp_path, NVFP4, exact=True)


def test_mxfp4_is_bit_exact(tmp_path):
    model = quantized(32, activation=False)
    round_scales_to_powers_of_two(model, outer_only=False)
    fp4compile.export_compressed_tensors(model, tmp_path, MXFP4)
    assert_means_the_same(model, tmp_path, MXFP4, exact=True)


def test_what_a_format_cannot_express_is_named(tmp_path):
    model = quantized(16, activation=True)
    with pytest.raises(InterchangeError, match=r"up_proj\.weight: it has blocks of 16"):
        fp4compile.export_compressed_tensors(model, tmp_path, MXFP4)
    with pytest.raises(InterchangeError, match=r"powers of two"):
        fp4compile.export_compressed_tensors(quantized(32, activation=False), tmp_path, MXFP4)
    full = fp4compile.quantize(tiny_llama(layers=1), DATA, method="minmax", progress=False)
    with pytest.raises(InterchangeError) as caught:
        fp4compile.export_compressed_tensors(full, tmp_path)
    assert "embed_tokens.weight: only nn.Linear is expressed" in str(caught.value)
    assert "up_proj.weight: it has a scale per channel" in str(caught.value)
    with pytest.raises(InterchangeError, match="unknown format"):
        fp4compile.export_compressed_tensors(model, tmp_path, "int4")
    with pytest.raises(InterchangeError, match="not a transformers model"):
        fp4compile.export_compressed_tensors(NormThenLinears(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, FP4Tensor)
