"""Checkpoints of other programs become FP4 weights that mean what those programs say they mean."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import fp4compile
from fp4compile.errors import InterchangeError
from fp4compile.integrations.foreign import e4m3_of_powers
from fp4compile.integrations.serialize import fp4_parameters
from fp4compile.tensor import FP4Tensor

compressed_tensors = pytest.importorskip("compressed_tensors")
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
X = tokens(seed=9)


def arguments(format: str) -> dict:
    strategy, size = ("tensor_group", 16) if format == NVFP4 else ("group", 32)
    return {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}


def compressed(folder: Path, format: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A checkpoint whose linears the compressed-tensors library rounded, and what it says they
    mean.
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=arguments(format))
    compressor = BaseCompressor.get_value_from_registry(format)
    model = tiny_llama(layers=1)
    state, expected = dict(model.state_dict()), {}
    del state["lm_head.weight"]
    for name in [name for name in state if "_proj.weight" in name]:
        weight = state.pop(name)
        blocks = weight.unflatten(1, (-1, scheme.weights.group_size)).abs().amax(dim=-1) / 6
        parts = {"weight": weight, "weight_scale": torch.exp2(blocks.log2().ceil())}
        if format == NVFP4:
            parts["weight_global_scale"] = 448 / blocks.amax().reshape(1)
            parts["weight_scale"] = blocks * parts["weight_global_scale"]
        packed = compressor.compress(parts, scheme)
        expected[name] = compressor.decompress(packed, scheme)["weight"]
        state |= {name.replace("weight", part, 1): tensor for part, tensor in packed.items()}
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments(format)}},
        "ignore": ["lm_head"],
    }
    write(folder, model, state, config)
    return model, expected


def write(folder: Path, model: nn.Module, state: dict, config: dict) -> None:
    model.config.save_pretrained(folder)
    edit(folder, quantization_config=config)
    plain = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize("format", [NVFP4, MXFP4])
def test_weights_mean_what_compressed_tensors_decompresses(format, tmp_path):
    model, expected = compressed(tmp_path, format)
    loaded = fp4compile.from_pretrained(tmp_path)
    weights = fp4_parameters(loaded)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        meant = expected[name]
        if format == MXFP4:
            assert torch.equal(weight.dequantize().to(meant.dtype), meant), name
        else:  # the library's arithmetic is that of bfloat16
            torch.testing.assert_close(
                weight.dequantize().to(meant.dtype), meant, rtol=2**-7, atol=0
            )
    # What was not compressed is there, and the head is tied.
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded(X).logits.isfinite().all()


@pytest.mark.parametrize(
    ("format", "activation"), [(NVFP4, False), (NVFP4, True), (MXFP4, False)], ids=str
)
def test_what_was_exported_comes_back(format, activation, tmp_path):
    size = 16 if format == NVFP4 else 32
    block = fp4compile.TensorSpec(4, ("e2m1",), "block", block_size=size)
    spec = fp4compile.QuantSpec(block, block if activation else None, None)
    model = tiny_llama(layers=1)
    fp4compile.quantize(model, [tokens(seed=1)], spec, method="minmax", progress=False)
    for weight in fp4_parameters(model).values():
        weight.weight_scale = torch.exp2(weight.weight_scale.log2().round())
        if activation:
            weight.activation_scale = torch.exp2(weight.activation_scale.log2().round())
        if format == MXFP4:
            weight.block_scale = weight.block_scale & 0x78 | 0x08  # exponents, none subnormal
    fp4compile.export_compressed_tensors(model, tmp_path / "exported", format)
    loaded = fp4compile.from_pretrained(tmp_path / "exported")
    for name, weight in fp4_parameters(model).items():
        again = fp4_parameters(loaded)[name]
        assert again.__tensor_flatten__()[1] == weight.__tensor_flatten__()[1], name
        assert torch.equal(again.packed_weight, weight.packed_weight)
        assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(loaded(X).logits, model(X).logits)
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(fp4compile.from_pretrained(tmp_path / "ours")(X).logits, model(X).logits)


def test_experts_of_gpt_oss(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts_per_tok=2,
        num_local_experts=3,
        vocab_size=96,
        pad_token_id=0,
    )
    plain = GptOssForCausalLM(config).eval()
    state, expected = dict(plain.state_dict()), {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, channels, outputs = state[name].shape
        blocks = torch.randint(256, (experts, outputs, channels // 32, 16), dtype=torch.uint8)
        scales = torch.randint(112, 122, blocks.shape[:-1], dtype=torch.uint8)
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        state[name].copy_(expected[name])
        del state[name]
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    write(tmp_path, plain, state, {"quant_method": "mxfp4"})
    loaded = fp4compile.from_pretrained(tmp_path, dtype=torch.float32)
    weights = fp4_parameters(loaded)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.dequantize(), expected[name]), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(X).logits, plain(X).logits, rtol=1e-3, atol=1e-4)


def test_scales_that_are_powers_of_two_are_exact_as_far_as_e4m3_reaches():
    packed = torch.full((2, 9 * 16), 0x2A, dtype=torch.uint8)
    exponents = torch.arange(100, 118, dtype=torch.uint8).view(2, 9)  # 17 powers of two
    codes, outer = e4m3_of_powers(packed, exponents)
    assert torch.equal(
        codes.view(torch.float8_e4m3fn).float() * outer, torch.exp2(exponents.float() - 128)
    )
    exponents[0, 0] = 90
    with pytest.raises(InterchangeError, match="reach over 27 powers of two"):
        e4m3_of_powers(packed, exponents)
    packed[0, :16] = 0x80  # plus and minus zero: its scale does not matter
    codes, outer = e4m3_of_powers(packed, exponents)
    assert float(codes.view(torch.float8_e4m3fn).float().amax() * outer) == 2.0**-11
    exponents[1, 1] = 255
    with pytest.raises(InterchangeError, match="no numbers"):
        e4m3_of_powers(packed, exponents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "quantiles",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "integers"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "only these formats"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": MXFP4,
                "config_groups": {"a": {"input_activations": {"num_bits": 4, "type": "float"}}},
            },
            "only those of NVFP4",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": MXFP4,
                "config_groups": {"a": {"weights": {"symmetric": False}}},
            },
            "zero points",
        ),
    ],
    ids=["nf4", "int8", "int4", "activations", "zero-points"],
)
def test_other_formats_are_refused(changes, message, tmp_path):
    tiny_llama(layers=1).save_pretrained(tmp_path)
    edit(tmp_path, quantization_config=changes)
    with pytest.raises(InterchangeError, match=message):
        fp4compile.from_pretrained(tmp_path)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, caplog, monkeypatch):
    # transformers logs what our conversion raised, then raises an error of its own.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    tiny_llama(layers=1).save_pretrained(tmp_path / "plain")
    with pytest.raises(InterchangeError, match="in full precision"):
        fp4compile.from_pretrained(tmp_path / "plain")
    compressed(tmp_path / "packed", NVFP4)
    state = load_file(tmp_path / "packed" / "model.safetensors")
    scale = state.pop("model.layers.0.mlp.up_proj.weight_global_scale")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    write(tmp_path / "packed", tiny_llama(layers=1), state, config)
    with pytest.raises(RuntimeError):
        fp4compile.from_pretrained(tmp_path / "packed")
    assert "no global_scale of model.layers.0.mlp.up_proj.weight" in caplog.text
    state |= {
        "model.layers.0.mlp.up_proj.weight_global_scale": scale,
        "model.layers.7.extra": scale.clone(),
    }
    write(tmp_path / "packed", tiny_llama(layers=1), state, config)
    with pytest.raises(InterchangeError, match=r"layers\.7\.extra"):
        fp4compile.from_pretrained(tmp_path / "packed")


def test_an_imported_weight_runs_on_the_kernels_for_blocks(tmp_path):
    compressed(tmp_path, MXFP4)
    weight = fp4compile.from_pretrained(tmp_path).model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, FP4Tensor)
    assert not fp4compile.load_lowerings().kernel_for(weight, False).is_reference
