"""``overrides=``: another spec for some weights."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile.errors import SelectionError, SpecError
from fp4compile.formats import by_name
from fp4compile.qparams import QuantSpec

DATA = [tokens(seed=1), tokens(seed=2)]


def bits(model: nn.Module) -> dict[str, tuple[int, int | None]]:
    """(weight, activation) bits by site."""
    return {
        site.name: (
            by_name(site.weight_format).bits,
            by_name(site.activation_format).bits if site.activation_format else None,
        )
        for site in model.fp4_report.sites
    }


def quantized(overrides, **options) -> nn.Module:
    options = {"method": "minmax", "progress": False, **options}
    return fp4compile.quantize(tiny_llama(), DATA, "w4a4", overrides=overrides, **options)


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("*.down_proj", lambda name: ".down_proj" in name),
        (r"re:layers\.1\..*proj", lambda name: ".layers.1." in name),
        (lambda name, module: name.endswith("q_proj"), lambda name: ".q_proj" in name),
        ("lm_head", lambda name: "embed_tokens" in name),
    ],
    ids=["glob", "regex", "predicate", "alias"],
)
def test_an_override_decides_the_bits_of_what_it_matches(selector, matches):
    found = bits(quantized({selector: "w6a6"}))
    for name, (weight, activation) in found.items():
        wanted = 6 if matches(name) else 4
        assert (weight, activation) == (wanted, wanted), name


def test_a_class_is_a_selector_and_the_first_match_counts():
    found = bits(quantized({"*.down_proj": "w8a8", nn.Linear: "w4a8"}))
    assert {found[name] for name in found if "down_proj" in name} == {(8, 8)}
    assert {found[name] for name in found if "down_proj" not in name} == {(4, 8)}


@pytest.mark.parametrize("sequential", [False, True])
def test_siblings_with_different_specs_have_activations_of_their_own(sequential, tmp_path):
    options = {"method": "fpq", "sequential": sequential, "calibration_dir": tmp_path / "kept"}
    model = quantized({"*.k_proj": "w4a8", "*.v_proj": "w4a16"}, **options)
    found = bits(model)
    assert {found[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"} == {
        (4, 4), (4, 8), (4, None),
    }  # fmt: skip
    again = quantized({"*.k_proj": "w4a8", "*.v_proj": "w4a16"}, **options)
    model.fp4_report.recipe.save(tmp_path / "recipe.json")
    repeated = fp4compile.quantize(tiny_llama(), recipe=tmp_path / "recipe.json")
    for other in (again, repeated):
        assert torch.equal(other(tokens(seed=9)).logits, model(tokens(seed=9)).logits)


def test_an_override_may_quantize_embeddings_that_the_spec_keeps():
    weights_only = QuantSpec(fp4compile.TensorSpec(4), None, None)
    options = {"method": "minmax", "progress": False}
    model = fp4compile.quantize(tiny_llama(), DATA, weights_only, **options)
    assert "model.embed_tokens.weight" in model.fp4_report.skipped
    model = fp4compile.quantize(
        tiny_llama(), DATA, weights_only, overrides={nn.Embedding: "w8a8"}, **options
    )
    assert bits(model)["model.embed_tokens.weight"] == (8, 8)
    assert not model.fp4_report.skipped


@pytest.mark.parametrize(
    ("overrides", "error"),
    [({"*.no_proj": "w4a8"}, SelectionError), ({"*.down_proj": "w5a5"}, SpecError)],
    ids=["unmatched", "preset"],
)
def test_a_wrong_override_is_refused(overrides, error):
    with pytest.raises(error, match=r"no_proj|w5a5"):
        quantized(overrides)
