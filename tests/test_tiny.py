"""The whole pipeline on tiny models, in seconds: quantize, select, recipe, report, failure."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import torch
from models import MatrixProducts, NormThenLinears, tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile.errors import (
    AlreadyQuantizedError,
    CalibrationDataError,
    NonFiniteError,
    RecipeError,
    SelectionError,
)
from fp4compile.qparams import PRESETS
from fp4compile.recipe import Recipe
from fp4compile.tensor import FP4Tensor

DATA = [tokens(seed=1), tokens(seed=2)]


def relative_error(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        got, expected = model(tokens(seed=9)).logits, reference(tokens(seed=9)).logits
    return float((got - expected).square().sum() / expected.square().sum())


@pytest.fixture(scope="module")
def w4a4() -> nn.Module:
    return fp4compile.quantize(tiny_llama(), DATA, progress=False)


def test_every_weight_is_fp4_and_the_original_is_gone(w4a4):
    assert len(w4a4.fp4_report.sites) == 15
    assert not w4a4.fp4_report.skipped
    big = [p for p in w4a4.parameters() if p.dim() > 1]
    assert all(isinstance(parameter, FP4Tensor) for parameter in big)
    assert w4a4.lm_head.weight is w4a4.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in w4a4.parameters())


# Relative errors of the logits; random weights are harder than trained ones. Each bound is above
# what was measured by less than a factor of two.
BOUNDS = {"w4a4": 0.6, "w4a8": 0.27, "w4a16": 0.27, "w6a6": 0.085, "w8a8": 0.0075}


@pytest.mark.parametrize("spec", PRESETS)
def test_error_falls_with_the_bits(spec):
    model = fp4compile.quantize(tiny_llama(layers=1), DATA, spec, progress=False)
    assert relative_error(model, tiny_llama(layers=1)) < BOUNDS[spec]


@pytest.mark.parametrize("options", [{"sequential": True}, {"spec": "per_token"}], ids=str)
def test_options_work_end_to_end(options):
    if options.get("spec") == "per_token":
        options = {"spec": fp4compile.QuantSpec.preset("w4a4").per_token()}
    model = fp4compile.quantize(tiny_llama(layers=1), DATA, progress=False, **options)
    assert relative_error(model, tiny_llama(layers=1)) < BOUNDS["w4a4"]


@pytest.mark.parametrize("spec", ["w4a4", "w4a8", "w4a16"])
def test_best_beats_fpq_at_the_same_bits_and_its_recipe_repeats_it(spec, tmp_path):
    best = fp4compile.quantize(tiny_llama(layers=1), DATA, spec, method="best", progress=False)
    fpq = fp4compile.quantize(tiny_llama(layers=1), DATA, spec, progress=False)
    errors = [[site.error for site in model.fp4_report.sites] for model in (best, fpq)]
    assert median(errors[0]) < median(errors[1])
    best.fp4_report.recipe.save(tmp_path / "recipe.json")
    again = fp4compile.quantize(tiny_llama(layers=1), recipe=tmp_path / "recipe.json")
    assert torch.equal(best(tokens(seed=9)).logits, again(tokens(seed=9)).logits)
    assert torch.equal(best.lm_head.weight.dequantize(), again.lm_head.weight.dequantize())


def test_a_recipe_without_its_codes_is_refused(w4a4, tmp_path):
    w4a4.fp4_report.recipe.save(tmp_path / "recipe.json")
    (tmp_path / "recipe.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"recipe\.safetensors"):
        fp4compile.quantize(tiny_llama(), recipe=tmp_path / "recipe.json")


def test_the_graph_has_fp4_ops_where_the_linears_were(w4a4):
    exported = torch.export.export(
        w4a4, (), {"input_ids": tokens(), "use_cache": False}, strict=False
    )
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.fp4.linear.default) == 15
    assert targets.count(torch.ops.fp4.embedding.default) == 1
    assert torch.ops.aten.linear.default not in targets


def test_generate_runs_quantized(w4a4):
    out = w4a4.generate(tokens(2, 5), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)


def test_a_recipe_repeats_the_run_bit_for_bit(w4a4, tmp_path):
    path = tmp_path / "recipe.json"
    w4a4.fp4_report.recipe.save(path)
    again = fp4compile.quantize(tiny_llama(), recipe=path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, w4a4(tokens()).logits)


def test_a_recipe_says_why_a_weight_was_skipped(tmp_path):
    model = fp4compile.quantize(
        tiny_llama(), DATA, method="minmax", ignore=["*.down_proj"], progress=False
    )
    model.fp4_report.recipe.save(tmp_path / "recipe.json")
    skipped = Recipe.load(tmp_path / "recipe.json").skipped
    assert skipped["model.layers.0.mlp.down_proj.weight"] == "in ignore"


def test_wrong_recipes_are_refused(tmp_path):
    path = tmp_path / "recipe.json"
    with pytest.raises(RecipeError, match="cannot read"):
        fp4compile.quantize(tiny_llama(), recipe=path)
    path.write_text('{"version": 2}')
    with pytest.raises(RecipeError, match="not a recipe"):
        fp4compile.quantize(tiny_llama(), recipe=path)
    path.write_text('{"version": 99, "sites": {}}')
    with pytest.raises(RecipeError, match="version 99"):
        fp4compile.quantize(tiny_llama(), recipe=path)


def test_a_recipe_of_another_model_is_refused(w4a4):
    with pytest.raises(RecipeError, match="another model"):
        fp4compile.quantize(NormThenLinears(), [torch.randn(2, 32)], recipe=w4a4.fp4_report.recipe)


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"targets": ["*.down_proj"]}, 2),
        ({"targets": [r"re:layers\.0\..*(q|k)_proj"]}, 2),
        ({"targets": [nn.Embedding]}, 1),
        ({"ignore": ["lm_head", "*.mlp.*"]}, 8),
        ({"targets": [lambda name, module: "attn" in name and module.out_features == 32]}, 4),
        ({"spec": fp4compile.QuantSpec(*[fp4compile.TensorSpec(4)], None, None)}, 14),
    ],
    ids=["glob", "regex", "class", "ignore", "predicate", "spec"],
)
def test_selection(options, quantized):
    model = fp4compile.quantize(tiny_llama(), DATA, method="minmax", progress=False, **options)
    report = model.fp4_report
    assert len(report.sites) == quantized
    assert len(report.skipped) == 15 - quantized
    assert all(report.skipped.values())


def test_models_without_modules_are_quantized_by_what_they_compute():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    model, reference = MatrixProducts(), MatrixProducts()
    reference.load_state_dict(model.state_dict())
    fp4compile.quantize(model, [x], "w8a8", progress=False)
    assert {site.name for site in model.fp4_report.sites} == {"kn", "nk", "right"}
    with torch.no_grad():
        difference, expected = model(x) - reference(x), reference(x)
    assert difference.square().sum() < 1e-3 * expected.square().sum()


def test_the_report_adds_up(w4a4):
    report = w4a4.fp4_report
    assert 4.0 < report.bits_per_weight < 5.0
    assert "15 weights quantized" in report.summary()
    content = report.to_dict()
    assert len(content["sites"]) == 15
    assert all(site["error"] <= site["minmax_error"] for site in content["sites"])


def state(model: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    tensors = [(n, p.clone(), p.requires_grad) for n, p in model.named_parameters()]
    return tensors + [(n, torch.tensor(m.training), True) for n, m in model.named_modules()]


class FailsOnLongInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("model", "data", "options", "error"),
    [
        (tiny_llama(), [], {}, CalibrationDataError),
        (tiny_llama(), DATA, {"targets": ["nothing"]}, SelectionError),
        (FailsOnLongInput(), [torch.full((4, 8), torch.inf)], {}, NonFiniteError),
        (
            tiny_llama(),
            [DATA[0], {"input_ids": DATA[1], "attention_mask": DATA[1]}],
            {},
            CalibrationDataError,
        ),
    ],
    ids=["empty", "selection", "infinite", "structure"],
)
def test_a_failed_call_leaves_the_model_as_it_was(model, data, options, error):
    model.train()
    before = state(model)
    with pytest.raises(error):
        fp4compile.quantize(model, data, progress=False, **options)
    after = state(model)
    assert [entry[0] for entry in before] == [entry[0] for entry in after]
    assert all(torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(before, after, strict=True))
    assert not hasattr(model, "fp4_report")


def test_weights_must_be_finite():
    model = NormThenLinears()
    with torch.no_grad():
        model.up.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"up\.weight"):
        fp4compile.quantize(model, [torch.randn(2, 32)])


def test_quantizing_twice_is_refused(w4a4):
    with pytest.raises(AlreadyQuantizedError, match="again"):
        fp4compile.quantize(w4a4, DATA)


def test_calibration_data_are_not_changed():
    data = [{"input_ids": tokens(seed=3), "labels": tokens(seed=3)}]
    kept = copy.deepcopy(data)
    fp4compile.quantize(tiny_llama(), data, method="minmax", progress=False)
    assert data[0].keys() == kept[0].keys()
    assert torch.equal(data[0]["input_ids"], kept[0]["input_ids"])
