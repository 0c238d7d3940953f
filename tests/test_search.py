"""The search against brute force, its invariances, and the reference's figures."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fp4compile.errors import SpecError
from fp4compile.formats import FORMATS, alternatives, by_name, of_width
from fp4compile.numerics import fake_quantize, scale_for_max
from fp4compile.observers import observe
from fp4compile.qparams import PRESETS, QuantSpec, TensorSpec
from fp4compile.search import METHODS, GroupProblem, by_method
from fp4compile.search.activation import ActivationError, widest_shift
from fp4compile.search.candidates import (
    apply_activation,
    blocked_weight,
    exact_operand,
    minmax_decision,
    minmax_weight,
    output_errors,
)
from fp4compile.search.embedding import lookup_moment, search_embedding, tied_moment
from fp4compile.search.gptq import SCALE_FACTORS, Compensation
from fp4compile.search.grid import clip_factors
from fp4compile.search.problem import SearchOptions
from fp4compile.search.sorted_errors import channel_errors
from fp4compile.search.tokens import (
    HELD_OUT_STRIDE,
    mean_powers,
    shrunk_moment,
    split,
    tail_index,
    weighted_tokens,
)
from fp4compile.search.weight import OutputError, search_weight
from fp4compile.weights import channel_scales, dequantized, for_activation

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
    (got,) = channel_errors(x, token_weight, maxima, (fmt,))
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
    formats = alternatives(decision.weight.format)
    assert {fmt.bits for fmt in formats} == {spec.weight.bits}
    assert (decision.activation is None) == (spec.activation is None)
    if decision.activation is not None and method != "best":
        assert decision.activation.granularity == granularity
        shift = decision.activation.exponent_shift
        if shift is not None and not decision.activation.shift_in_weight:
            assert int(shift.min()) >= 0
            assert int(shift.max()) <= by_name(decision.activation.format).max_shift


def test_shifts_pay_where_channels_differ():
    spec = QuantSpec.preset("w4a4")
    with_shifts = by_method("fpq").search_group(problem(spec))["w"]
    without = by_method("fpq_baseline").search_group(problem(spec))["w"]
    assert without.activation.exponent_shift is None
    assert with_shifts.error < 0.8 * without.error


def test_shifts_by_error_beat_shifts_by_maximum():
    start = problem(QuantSpec.preset("w4a4"))
    paper = replace(start, options=SearchOptions(shift_choice="maximum"))
    by_error, by_maximum = (by_method("fpq").search_group(p)["w"] for p in (start, paper))
    assert by_maximum.activation.exponent_shift is not None
    assert by_error.error < by_maximum.error


def test_shifts_move_into_weights_where_activations_have_bits_to_spare():
    x, weight = layer()
    # Channels that matter have small weights: their 4 bits are badly spent as they are.
    start = GroupProblem({"w": weight / x.square().mean(0)}, observe([x]), QuantSpec.preset("w4a8"))
    plain = replace(start, options=SearchOptions(balance=False))
    with_shifts, without = (by_method("fpq").search_group(p)["w"] for p in (start, plain))
    assert with_shifts.activation.shift_in_weight
    assert with_shifts.error < 0.5 * without.error
    assert (
        not by_method("fpq")
        .search_group(problem(QuantSpec.preset("w4a4")))["w"]
        .activation.shift_in_weight
    )


def test_channels_beyond_the_range_of_shifts_move_into_the_weights():
    x, weight = torch.randn(600, 32), torch.randn(24, 32)
    spread = torch.exp2(torch.linspace(0, 20, 32))
    start = GroupProblem({"w": weight / spread}, observe([x * spread]), QuantSpec.preset("w6a6"))
    plain = replace(start, options=SearchOptions(balance=False))
    with_shifts, without = (by_method("fpq").search_group(p)["w"] for p in (start, plain))
    assert with_shifts.activation.shift_in_weight
    assert with_shifts.error < 0.5 * without.error


@pytest.mark.parametrize("preset", ["w4a4", "w6a6"])
def test_rotation_spreads_outliers_that_no_channel_is_known_for(preset):
    generator = torch.Generator().manual_seed(0)
    rare = torch.rand(600, 64, generator=generator) < 0.02
    x = torch.randn(600, 64, generator=generator) * (1 + 20 * rare)
    weight = torch.randn(24, 64, generator=generator)
    spec = QuantSpec.preset(preset).per_token()
    start = GroupProblem({"w": weight}, observe([x]), spec)
    turned = replace(start, options=SearchOptions(rotate=True))
    without, rotated = (by_method("fpq").search_group(p)["w"] for p in (start, turned))
    assert without.activation.rotation == 1
    assert rotated.activation.rotation == 64
    assert rotated.weight.scale.shape == (24,)
    assert rotated.error < 0.8 * without.error


def test_a_wider_margin_prefers_a_format_of_the_int8_route():
    start = problem(QuantSpec.preset("w8a8"))
    free, fast = (
        by_method("fpq").search_group(replace(start, options=SearchOptions(format_margin=margin)))
        for margin in (0.0, 100.0)
    )
    assert not by_name(free["w"].activation.format).fits_int8
    assert fast["w"].activation.format == "e1m6"


@pytest.mark.parametrize(
    "wrong", [{"rounding": "up"}, {"shift_choice": "mean"}, {"rounds": 0}, {"sample_tokens": 8}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(SpecError):
        SearchOptions(**wrong)


@pytest.mark.parametrize("preset", ["w6a6", "w8a8"])
def test_the_widest_shifts_undo_any_powers_of_two(preset):
    spec = QuantSpec.preset(preset)
    column = torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    powers = torch.tensor([0, 3, 7, 5, 1, 0, 6, 2])
    start = GroupProblem(
        {"w": torch.randn(12, 8)}, observe([column * torch.exp2(powers)]), spec, options=IN_SAMPLE
    )
    tokens, (weights, _) = weighted_tokens(start), minmax_decision(start)
    found = widest_shift(
        tokens, ActivationError.of(start, weights, mean_powers(start, tokens)), spec.activation
    )
    assert torch.equal(found.long(), powers)


def test_a_decided_weight_stays():
    x, weight = layer()
    fixed = minmax_weight(weight, TensorSpec(4, formats=("e1m2",)))
    start = GroupProblem({"w": weight}, observe([x]), QuantSpec.preset("w4a4"))
    decision = by_method("fpq").search_group(replace(start, decided={"w": fixed}))["w"]
    assert decision.weight is fixed


@pytest.mark.parametrize("fmt", of_width(4), ids=lambda fmt: fmt.name)
def test_compensated_rounding_keeps_scales_and_beats_the_nearest(fmt):
    x, weight = layer()
    x[:, 1:] += x[:, :-1]  # correlated channels are what compensation lives from
    moment = x.t() @ x / len(x)
    nearest = minmax_weight(weight, TensorSpec(4, formats=(fmt.name,)))
    found = Compensation(moment).rounded(weight, nearest)
    assert found.scale is nearest.scale
    objective = OutputError.of_inputs(moment)
    before, after = (
        float(objective.rows(dequantized(weight, q), weight).sum()) for q in (nearest, found)
    )
    assert after < 0.95 * before


@pytest.mark.parametrize("fmt", of_width(4), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("block_size", [0, 16])
def test_sweeps_lower_every_rows_error_until_no_code_is_better_than_another(
    monkeypatch, fmt, block_size
):
    x, weight = layer(channels=24)
    x[:, 1:] += x[:, :-1]
    x[:, 5] = 0  # a channel that is always zero keeps its codes
    moment = x.t() @ x / len(x)
    granularity = "block" if block_size else "channel"
    start = minmax_weight(weight, TensorSpec(4, (fmt.name,), granularity, block_size=block_size))
    objective = OutputError.of_inputs(moment)
    seen, errors = Compensation(moment), []
    for sweeps in (0, 1, 2, 30):
        monkeypatch.setattr("fp4compile.search.gptq.SWEEPS", sweeps)
        found = dequantized(weight, seen.rounded(weight, start))
        errors.append(objective.rows(found, weight))
    for before, after in pairwise(errors):
        assert (after <= before * 1.0001).all()
    assert errors[-1].sum() < errors[0].sum()
    scales = channel_scales(start, 24).expand(24, 24)
    for column in range(24):
        for value in fmt.integer_values:
            other = found.clone()
            other[:, column] = value * scales[:, column]
            assert (objective.rows(other, weight) >= errors[-1] * 0.9999).all()


def test_every_row_takes_the_scale_that_is_best_after_compensation(monkeypatch):
    monkeypatch.setattr("fp4compile.search.gptq.SWEEPS", 0)
    x, weight = layer(outputs=64)
    moment = x.t() @ x / len(x)
    seen, objective = Compensation(moment), OutputError.of_inputs(moment)
    nearest = minmax_weight(weight, TensorSpec(4))
    found = seen.rescaled(weight, nearest)
    least = objective.rows(dequantized(weight, found), weight)
    for factor in SCALE_FACTORS:
        other = seen.rounded(weight, replace(nearest, scale=nearest.scale * factor))
        assert (least <= objective.rows(dequantized(weight, other), weight) * 1.0001).all()
    chosen = (found.scale / nearest.scale).round(decimals=3).unique()
    assert len(chosen) == len(SCALE_FACTORS), "rows differ in what is best"


def test_compensated_rounding_without_correlation_is_rounding_to_nearest():
    _, weight = layer()
    nearest = minmax_weight(weight, TensorSpec(4))
    found = Compensation(torch.eye(32)).rounded(weight, nearest)
    assert torch.equal(dequantized(weight, found), dequantized(weight, nearest))


def test_compensated_rounding_works_in_blocks_and_in_parts_of_rows(monkeypatch):
    x, weight = layer(outputs=40)
    moment = x.t() @ x
    blocks = blocked_weight(weight, (by_name("e2m1"), by_name("e1m2")), 16, (1.0, 0.85))
    whole = Compensation(moment).rounded(weight, blocks)
    monkeypatch.setattr("fp4compile.weights.ROWS", 16)
    assert torch.equal(Compensation(moment).rounded(weight, blocks).packed, whole.packed)
    objective = OutputError.of_inputs(moment)
    errors = [float(objective.rows(dequantized(weight, q), weight).sum()) for q in (blocks, whole)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("preset", ["w4a4", "w4a8", "w6a6"])
def test_best_beats_fpq_and_keeps_the_product(preset):
    start = problem(QuantSpec.preset(preset), outputs=64, channels=64)
    best, fpq = (by_method(m).search_group(start)["w"] for m in ("best", "fpq"))
    assert best.error < fpq.error
    x, weight = start.statistics.sample, start.weights["w"]
    working = for_activation(weight, best.activation)
    y_hat = apply_activation(x, best.activation) @ dequantized(working, best.weight).t()
    y = x @ weight.t()
    assert float((y_hat - y).square().sum() / y.square().sum()) < 3 * best.error


def test_minmax_with_blocks_of_16_is_nvfp4():
    block = TensorSpec(4, ("e2m1",), "block", block_size=16)
    start = problem(QuantSpec(block, block, block))
    weights, activation = minmax_decision(start)
    assert weights["w"].block_scale.shape == (24, 2)
    # One float32 per tensor maps its largest block to the largest E4M3 scale.
    outer = start.weights["w"].abs().amax() / 448 / 12
    assert torch.equal(weights["w"].scale, outer[None])
    assert int(weights["w"].block_scale.max()) == 126  # 448
    errors = output_errors(start, weighted_tokens(start), weights, activation)
    assert errors["w"] < 0.03


def test_a_tied_head_may_be_transformed_by_best_but_a_decided_one_not():
    x, weight = layer(outputs=64)
    start = GroupProblem(
        {"w": weight}, observe([x]), QuantSpec.preset("w4a4"), tied=frozenset({"w"})
    )
    free = by_method("best").search_group(start)["w"]
    assert free.activation.exponent_shift is not None
    fixed = by_method("best").search_lookup(weight, start.spec.embedding, None, SearchOptions())
    decided = by_method("best").search_group(replace(start, decided={"w": fixed}))["w"]
    assert decided.activation.exponent_shift is None
    assert decided.activation.rotation == 1
    assert decided.weight is fixed


def test_fpq_refuses_blocks():
    block = TensorSpec(4, ("e2m1",), "block", block_size=16)
    with pytest.raises(SpecError, match="method='best'"):
        by_method("fpq").search_group(problem(QuantSpec(block, None, block)))


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
    alone, tied = (search_embedding(weight, spec, head, SearchOptions()) for head in (None, moment))
    head = OutputError.of_inputs(moment)
    errors = [float(head.rows(dequantized(weight, found), weight).sum()) for found in (alone, tied)]
    assert errors[1] < errors[0]


def test_the_lookup_moment_is_the_mean_relative_error_of_rows():
    x, weight = layer()
    change = torch.randn_like(weight) / 10
    rows = (change @ lookup_moment(weight) * change).sum(1).mean()
    torch.testing.assert_close(rows, change.square().sum() / weight.square().sum())
    head = x.t() @ x / len(x)
    options = SearchOptions(lookup_weight=0.25)
    both = (change @ tied_moment(weight, head, options) * change).sum(1).mean()
    y, difference = x @ weight.t(), x @ change.t()
    of_head = difference.square().sum() / y.square().sum()
    torch.testing.assert_close(both, of_head + rows / 4)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(SpecError, match="fpq_baseline"):
        by_method("magic")
    with pytest.raises(SpecError, match="w4a4"):
        QuantSpec.preset("w3a3")


@pytest.mark.parametrize("index", [3.0, 4.0, 9.0])
def test_clipping_of_unseen_tokens_is_the_mean_over_their_power_law(index):
    tokens = weighted_tokens(problem(QuantSpec.preset("w4a4"), tokens=64, channels=3))
    tokens = replace(tokens, tail_index=index)
    ratios = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.5, 2.0])[:, None]
    # Quantiles of the law whose tail is h^-index beyond 1.
    h = (1 - (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000) ** (-1 / index)
    expected = torch.stack([(h - r).clamp_min(0).square().mean() for r in ratios.double()])
    found = tokens.clipping_errors(ratios * tokens.absmax)
    unit = tokens.tail_weight * tokens.absmax.square()
    torch.testing.assert_close(
        found / unit, expected[:, None].float().expand(-1, 3), rtol=0.05, atol=1e-4
    )


@pytest.mark.parametrize("index", [3.0, 4.0, 6.0])
def test_the_tail_index_is_that_of_the_power_law_the_tokens_follow(index):
    uniform = torch.rand(8192, 64, generator=torch.Generator().manual_seed(0))
    assert tail_index(uniform ** (-1 / index)) == pytest.approx(index, rel=0.15)
    assert tail_index(8 * uniform ** (-1 / index)) == tail_index(uniform ** (-1 / index))
    assert tail_index(torch.zeros(10, 4)) == tail_index(torch.ones(10, 4)) == 16.0
    # Values that end somewhere have no heavy tail.
    assert tail_index(uniform) == 16.0


@pytest.mark.parametrize("length", [64, 96, 256])
def test_massive_tokens_are_searched_on_and_held_out_in_their_share(length):
    # Attention sinks: the first token of every sequence.
    x, weight = layer(tokens=24 * length)
    x[::length] *= 1000
    tokens = weighted_tokens(GroupProblem({"w": weight}, observe([x]), QuantSpec.preset("w4a4")))
    train, held_out = split(tokens)

    def massive(some) -> int:
        return int(
            (some.x.square().sum(dim=1) > 1000 * tokens.x.square().sum(dim=1).median()).sum()
        )

    assert massive(tokens) == 24
    assert massive(held_out) == 24 / HELD_OUT_STRIDE
    assert massive(train) == 24 - massive(held_out)
    for size in (len(x) // 2, len(x) // 6):
        share = massive(tokens) * len(train.thinned(size).x) / len(x)
        assert abs(massive(train.thinned(size)) - share) <= 1


@pytest.mark.parametrize("bits", [6, 8])
def test_fine_static_formats_do_not_clip_a_channel_that_grows(bits):
    # Larger tokens than calibration saw are the rule: in use there are far more of them.
    start = problem(QuantSpec.preset(f"w{bits}a{bits}"), tokens=600, channels=32)
    x = 1.5 * start.statistics.sample
    unaware = replace(start, options=SearchOptions(unseen=0.0))

    def error(of: GroupProblem) -> float:
        activation = by_method("fpq").search_group(of)["w"].activation
        exact = exact_operand(x, activation)
        difference = apply_activation(x, activation) - exact
        return float(difference.square().sum() / exact.square().sum())

    assert error(start) < error(unaware)


def test_moments_of_few_tokens_shrink_towards_their_diagonal():
    x = torch.randn(4096, 48, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        48, 48, generator=torch.Generator().manual_seed(1)
    )
    truth = x.t() @ x / len(x)

    def distance(moment, tokens):
        return float((moment / tokens - truth).square().sum())

    for tokens in (32, 128):
        some = x[:tokens]
        assert distance(shrunk_moment(some, 1.0), tokens) < distance(some.t() @ some, tokens)
        torch.testing.assert_close(
            shrunk_moment(some, 1.0).diagonal(), (some.t() @ some).diagonal()
        )
    assert torch.equal(shrunk_moment(some, 0.0), some.t() @ some)


def test_specs_that_mean_nothing_are_refused():
    four = TensorSpec(4)
    with pytest.raises(SpecError, match="per tensor, token or block"):
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


# What those figures measure: the error on the very tokens that were searched on, all alike.
IN_SAMPLE = SearchOptions(
    sink_power=math.inf, weight_sink_power=math.inf, unseen=0.0, moment_shrinkage=0.0
)


@pytest.mark.parametrize("preset", REFERENCE)
def test_output_error_is_at_most_the_papers_code(preset, reference_layer):
    x, weight, bias = reference_layer
    spec = QuantSpec.preset(preset)
    start = GroupProblem({"w": weight}, observe([x]), spec, options=IN_SAMPLE)
    decision = by_method("fpq").search_group(start)["w"]
    y = x @ weight.t() + bias
    y_hat = (
        apply_activation(x, decision.activation) @ dequantized(weight, decision.weight).t() + bias
    )
    assert float((y_hat - y).square().sum() / y.square().sum()) <= REFERENCE[preset]
