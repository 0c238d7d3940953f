"""Saved and loaded models are the same bit for bit, and nothing but packed codes is ever loaded."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tiny_mixtral, tokens
from safetensors import safe_open
from torch import nn

import fp4compile
from fp4compile.errors import CheckpointError
from fp4compile.integrations.serialize import bits_per_parameter, fp4_parameters
from fp4compile.measure import dequantized_copy
from fp4compile.plain_weights import has_folded_shift
from fp4compile.tensor import FP4Tensor

DATA = [tokens(seed=1)]
X = tokens(seed=9)


def tiny_gpt2() -> nn.Module:
    """Conv1D weights [K, N], biases, LayerNorms with biases, a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_head=2, n_layer=1, vocab_size=96, n_positions=64, pad_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model


CASES = {
    "llama": (tiny_llama, "w4a4", {"method": "fpq"}),
    "llama-best": (tiny_llama, "w4a4", {"method": "best"}),
    "llama-partly": (tiny_llama, "w4a16", {"method": "minmax", "ignore": ["*.mlp.*"]}),
    "llama-six-bits": (tiny_llama, "w6a6", {"method": "minmax"}),
    "mixtral": (tiny_mixtral, "w4a16", {"method": "minmax"}),
    "gpt2": (tiny_gpt2, "w4a8", {"method": "fpq"}),
}


@pytest.fixture(scope="module", params=CASES)
def quantized(request) -> nn.Module:
    make, spec, options = CASES[request.param]
    return fp4compile.quantize(make(), DATA, spec, progress=False, **options)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return fp4compile.quantize(tiny_llama(), DATA, progress=False)


def load(path: Path, **options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    # Every parameter, folded norms and biases too, and tied ones tied.
    loaded_state, state = loaded.state_dict(), model.state_dict()
    assert loaded_state.keys() == state.keys()
    for name, value in state.items():
        assert_identical(loaded_state[name], value, name)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(X).logits, model(X).logits)


def assert_identical(loaded: torch.Tensor, value: torch.Tensor, name: str) -> None:
    assert type(loaded) is type(value), name
    if isinstance(value, FP4Tensor):
        parts, attributes = value.__tensor_flatten__()
        assert loaded.__tensor_flatten__() == (parts, attributes), name
        assert all(torch.equal(getattr(loaded, part), getattr(value, part)) for part in parts), name
    else:
        assert torch.equal(loaded, value), name


def test_a_loaded_model_is_the_saved_one(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, quantized)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), quantized)


def test_sharded_checkpoints_load(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load(tmp_path), llama)


def test_the_file_holds_what_the_config_says(llama, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fp4compile"):
        llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    bits = bits_per_parameter(llama)
    assert config["quant_method"] == "fp4compile"
    assert config["bits_per_parameter"] == pytest.approx(bits, abs=1e-4)
    assert f"{bits:.2f} bits per parameter" in caplog.text
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118  (no dict)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    assert 8 * stored / parameters == pytest.approx(bits)


def test_a_weight_of_the_wrong_size_is_not_saved(tmp_path):
    model = fp4compile.quantize(tiny_llama(layers=1), DATA, "w4a16", method="minmax")
    weight = model.lm_head.weight
    weight.packed_weight = weight.packed_weight.repeat(1, 2)
    with pytest.raises(CheckpointError, match="e2m1 needs"):
        model.save_pretrained(tmp_path)


def test_other_auto_classes_find_their_weights(llama, tmp_path):
    from transformers import AutoModel

    llama.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(X).last_hidden_state, llama.model(X).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    headless = load(tmp_path / "base")
    assert torch.equal(headless(X).logits, llama(X).logits)


def test_the_dtype_is_the_one_asked_for(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == loaded.model.norm.weight.dtype == torch.bfloat16
    assert weight.weight_scale.dtype == torch.float32
    assert loaded(X).logits.dtype == torch.bfloat16


def test_state_dicts_survive_a_weights_only_file(llama, tmp_path):
    torch.save(llama.state_dict(), tmp_path / "model.pt")
    loaded = tiny_llama(seed=5).requires_grad_(False)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    loaded.load_state_dict(state, assign=True)
    loaded.tie_weights()
    assert_same(loaded, llama)


def test_dequantize_gives_plain_weights(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    plain = load(tmp_path).dequantize().requires_grad_(False)
    assert not any(isinstance(parameter, FP4Tensor) for parameter in plain.parameters())
    # Norms hold factors of folded shifts, which the weights behind them take back.
    assert sum(map(has_folded_shift, fp4_parameters(llama).values())) > 2
    logits = plain(X).logits
    assert torch.equal(logits, dequantized_copy(llama, torch.float32)(X).logits)
    # A head whose input is shifted is no longer the embedding, and is saved.
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(load(tmp_path / "plain")(X).logits, logits)


def edited(path: Path, section: str | None, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (config[section] if section else config).update(changes)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "changes", "error", "message"),
    [
        ("quantization_config", {"format_version": 99}, CheckpointError, "format 99"),
        ("quantization_config", {"groups": []}, RuntimeError, "does not name it"),
        (None, {"intermediate_size": 96}, RuntimeError, "belongs to another model"),
    ],
    ids=["version", "groups", "shape"],
)
def test_what_does_not_fit_is_refused(
    llama, tmp_path, section, changes, error, message, caplog, monkeypatch
):
    # transformers logs what our conversion raised, then raises an error of its own.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    llama.save_pretrained(tmp_path)
    edited(tmp_path, section, **changes)
    with pytest.raises(error) as caught:
        load(tmp_path)
    assert message in str(caught.value) + caplog.text


def test_full_precision_checkpoints_are_not_quantized_on_load(llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"fp4compile\.quantize"):
        load(tmp_path, quantization_config=llama.config.quantization_config)


IMPORTS = """
import sys, torch, fp4compile
heavy = {"transformers", "torch._inductor.compile_fx", "fp4compile.lowering"} & set(sys.modules)
assert not heavy, heavy
import torch._inductor.compile_fx
assert "fp4compile.lowering.ops" in sys.modules
"""


def test_importing_is_cheap_and_inductor_then_knows_the_ops():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
