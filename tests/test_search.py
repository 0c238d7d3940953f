"""The search against brute force, its invariances, and the reference's figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp4compile.errors import SpecError
from fp4compile.formats import FORMATS, by_name, of_width
from fp4compile.numerics import fake_quantize, scale_for_max
from fp4compile.observers import observe
from fp4compile.qparams import PRESETS, QuantSpec, TensorSpec
from fp4compile.search import METHODS, GroupProblem, by_method
from fp4compile.search.activation import apply_activation
from fp4compile.search.embedding import search_embedding
from fp4compile.search.fpq import dequantized
from fp4compile.search.grid import clip_factors
from fp4compile.search.sorted_errors import SortedChannels
from fp4compile.search.weight import OutputError, minmax_weight, search_weight

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def layer(tokens: int = 600, channels: int = 32, outputs: int = 24, seed: int = 0):
    """Activations that differ strongly between channels, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(2 * torch.randn(channels, generator=generator))
    x = torch.randn(tokens, channels, generator=generator) * spread
    return x, torch.randn(outputs, channels, generator=generator)


def problem(spec: QuantSpec, **options) -> GroupProblem:
    x, weight = layer(**options)
    return GroupProblem({"w": weight}, observe([x]), spec)


@ALL
def test_sorted_errors_equal_quantizing_every_value(fmt):
    x, _ = layer(tokens=50, channels=5)
    token_weight = torch.rand(50) + 0.1
    maxima = x.abs().amax() * clip_factors(2, 3)
    got = SortedChannels.of(x, token_weight).errors(maxima, fmt)
    for maximum, errors in zip(maxima, got, strict=True):
        difference = fake_quantize(x, fmt, maximum / fmt.max_integer) - x
        expected = (difference.square() * token_weight[:, None]).sum(0) / token_weight.sum()
        torch.testing.assert_close(errors, expected, rtol=2e-3, atol=1e-7)


def test_weight_search_is_no_worse_than_any_clipping_of_any_format():
    x, weight = layer()
    objective = OutputError.of_inputs(x.t() @ x)
    found = search_weight(weight, objective, of_width(4))
    best = objective.rows(dequantized(weight, found), weight)
    for fmt in of_width(4):
        minmax = scale_for_max(weight.abs().amax(dim=1), fmt)
        errors = torch.stack(
            [
                objective.rows(fake_quantize(weight, fmt, (minmax * f)[:, None]), weight)
                for f in clip_factors(8, 2)
            ]
        )
        # Ranking by the diagonal may cost a little against trying everything.
        assert float(best.sum()) <= 1.05 * float(errors.min(dim=0).values.sum())
        assert bool((best.sum() <= errors[1].sum()).all())


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**13])
def test_search_is_invariant_to_the_scale_of_the_tensors(factor):
    x, weight = layer()
    spec = QuantSpec.preset("w4a4")
    one = by_method("fpq").search_group(GroupProblem({"w": weight}, observe([x]), spec))["w"]
    two = by_method("fpq").search_group(
        GroupProblem({"w": weight * factor}, observe([x * factor]), spec)
    )["w"]
    assert one.weight.format == two.weight.format
    assert one.activation.format == two.activation.format
    torch.testing.assert_close(two.weight.scale, one.weight.scale * factor)
    assert torch.equal(two.activation.exponent_shift, one.activation.exponent_shift)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_worse_than_minmax(method, preset, granularity):
    spec = QuantSpec.preset(preset)
    if spec.activation is not None and granularity == "token":
        spec = spec.per_token()
    decision = by_method(method).search_group(problem(spec))["w"]
    assert decision.error <= decision.minmax_error * (1 + 1e-6)
    assert by_name(decision.weight.format).bits == spec.weight.bits
    assert (decision.activation is None) == (spec.activation is None)
    if decision.activation is not None:
        assert decision.activation.granularity == granularity
        shift = decision.activation.exponent_shift
        if shift is not None:
            assert int(shift.min()) >= 0
            assert int(shift.max()) <= by_name(decision.activation.format).max_shift


def test_shifts_pay_where_channels_differ():
    spec = QuantSpec.preset("w4a4")
    with_shifts = by_method("fpq").search_group(problem(spec))["w"]
    without = by_method("fpq_baseline").search_group(problem(spec))["w"]
    assert without.activation.exponent_shift is None
    assert with_shifts.error < 0.8 * without.error


def test_a_decided_weight_stays():
    x, weight = layer()
    fixed = minmax_weight(weight, by_name("e1m2"))
    start = GroupProblem({"w": weight}, observe([x]), QuantSpec.preset("w4a4"))
    decision = by_method("fpq").search_group(replace(start, decided={"w": fixed}))["w"]
    assert decision.weight is fixed


def test_zero_rows_and_zero_activations_are_fine():
    x, weight = layer()
    weight[3] = 0
    x[:, 5] = 0
    decision = by_method("fpq").search_group(
        GroupProblem({"w": weight}, observe([x]), QuantSpec.preset("w4a4"))
    )["w"]
    assert bool(decision.weight.scale.isfinite().all())
    assert bool((dequantized(weight, decision.weight)[3] == 0).all())
    nothing = GroupProblem({"w": weight}, observe([torch.zeros(600, 32)]), QuantSpec.preset("w4a4"))
    assert by_method("fpq").search_group(nothing)["w"].activation.scale.isfinite()


def test_a_tied_embedding_weighs_its_head():
    x, weight = layer(outputs=64)
    spec = QuantSpec.preset("w4a4").weight
    moment = x.t() @ x / len(x)
    alone, tied = search_embedding(weight, spec), search_embedding(weight, spec, moment)
    head = OutputError.of_inputs(moment)
    errors = [float(head.rows(dequantized(weight, found), weight).sum()) for found in (alone, tied)]
    assert errors[1] < errors[0]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(SpecError, match="fpq_baseline"):
        by_method("magic")
    with pytest.raises(SpecError, match="w4a4"):
        QuantSpec.preset("w3a3")


def test_specs_that_mean_nothing_are_refused():
    four = TensorSpec(4)
    with pytest.raises(SpecError, match="per tensor or per token"):
        QuantSpec(four, four, four)
    with pytest.raises(SpecError, match="per output channel"):
        QuantSpec(TensorSpec(4, granularity="token"), None, None)
    with pytest.raises(SpecError, match="is not one of"):
        TensorSpec(4, granularity="row")
    with pytest.raises(SpecError, match="do not have 4 bits"):
        TensorSpec(4, formats=("e4m3",))
    with pytest.raises(SpecError, match="without activation"):
        QuantSpec(four, None, None).per_token()


# Relative output errors (with the bias in the output, tokens equally weighted) of the public
# LLM-FP4 code on one 40 x 48 layer with 60 tokens, 3 rounds, 100 candidates: figures measured once
# by running github.com/nbasyl/LLM-FP4, whose "4-bit" formats have 17 values instead of 15. At w4a8,
# where its finer weights decide, it reaches 0.006216 and our true 4 bits 0.0064.
REFERENCE = {"w4a4": 0.016971, "w6a6": 0.001655, "w8a8": 0.000166}


@pytest.mark.parametrize("preset", REFERENCE)
def test_output_error_is_at_most_the_papers_code(preset, reference_layer):
    x, weight, bias = reference_layer
    start = GroupProblem({"w": weight}, observe([x]), QuantSpec.preset(preset))
    decision = by_method("fpq").search_group(start)["w"]
    y = x @ weight.t() + bias
    y_hat = (
        apply_activation(x, decision.activation) @ dequantized(weight, decision.weight).t() + bias
    )
    assert float((y_hat - y).square().sum() / y.square().sum()) <= REFERENCE[preset]
