"""The benchmarks run; no time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, tiny_llama
from typer.testing import CliRunner

from bench import accuracy, calibrate, gemm, model, peers, static_bound
from bench.__main__ import app
from bench.compare import compare
from bench.gemm_peers import GEMM_PEERS, absent
from bench.timing import interleave
from fp4compile.search import METHODS


def test_candidates_take_turns():
    order = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=3, budget=0
    )
    assert "".join(order[4:]) == "ababab"  # after the warm-up of two calls each
    assert all(t.low <= t.median <= t.high for t in timings.values())


def test_every_way_to_compute_the_layer_is_measured(monkeypatch):
    monkeypatch.setattr(gemm, "WORKING_SET_BYTES", 1 << 12)
    monkeypatch.setattr(gemm, "BANDWIDTH_FLOATS", 1 << 12)
    monkeypatch.setattr(gemm, "MANY_ROWS", 3)
    results = list(gemm.run([(32, 64)], [1, 3], threads=1, repetitions=2))
    wide = ["w6a6 e2m3", "w8a8 e1m6", "w8a8 e4m3"]
    peers = [name for name in GEMM_PEERS if absent(name) is None]
    assert "torch int4" in peers  # which torch has
    names = ["fp4 w4a4", "fp4 w4a4 block 32", "fp4 w4a16", *wide, "bf16", "fp32", *peers]
    assert [(r.M, r.name) for r in results] == [(m, name) for m in (1, 3) for name in names]
    assert all(result.gops > 0 for result in results)
    for m in (1, 3):  # the peak is of one loop, the same for all
        rate = {r.gops / r.peak_share for r in results if r.peak_share and m == r.M}
        assert not rate or max(rate) < 1.001 * min(rate)


class Tokenizer:
    """A token per character."""

    def __call__(self, text: str, **options):
        ids = [ord(character) % VOCABULARY for character in text[:4096]]
        tensors = options.get("return_tensors") == "pt"
        batch = SimpleNamespace(input_ids=torch.tensor([ids]))
        return batch if tensors else {"input_ids": ids}


@pytest.mark.parametrize(
    "name", ["full precision", "w4a4 minmax", "w4a4 fpq_baseline on the reference's inputs"]
)
def test_a_configuration_is_measured(name, monkeypatch):
    monkeypatch.setattr(accuracy, "load_demo_model", lambda *_: (tiny_llama(layers=1), Tokenizer()))
    result = accuracy.measure(name, accuracy.Scoring(511))
    assert result.perplexity > 1
    assert result.tokens == 511
    assert result.bits_per_weight == 16 or 4 < result.bits_per_weight < 6
    assert (not result.layer_errors) == (name == "full precision")


def test_some_layers_are_measured(monkeypatch):
    monkeypatch.setattr(accuracy, "load_demo_model", lambda *_: (tiny_llama(layers=2), Tokenizer()))
    result = accuracy.measure("w4a4 minmax", accuracy.Scoring(511), layers=[1])
    assert len(result.layer_errors) == 7  # and neither embedding nor head
    assert list(result.layers) == [1]


def test_a_whole_model_is_measured_and_an_absent_peer_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer(lambda m: m, needs=("no_such_module",)))
    # A process knows only what is in the module.
    monkeypatch.setitem(peers.PEERS, "failing", peers.Peer())
    names = ["absent", "failing", "fp32 eager"]
    skipped, failed, result, twice = model.run(
        names, "llama-tiny", 1, prompt=8, batches=[1, 2], new=4, repetitions=2
    )
    assert skipped == model.Skipped("absent", "not installed: no_such_module")
    assert failed == model.Skipped("failing", "its process ended with 1; its error is above")
    assert result.name == "fp32 eager"
    assert result.compile_warm is None
    assert 0 < result.token_ms_p50 <= result.token_ms_p95
    assert all(rate.low <= rate.median <= rate.high for rate in (result.prefill, result.decode))
    assert (result.batch, twice.batch) == (1, 2)
    (tmp_path / "a.jsonl").write_text(json.dumps(result.to_json()))
    (tmp_path / "b.jsonl").write_text(json.dumps(replace(result, token_ms_p50=0.0).to_json()))
    changes = {change.metric for change in compare(*sorted(tmp_path.iterdir())).changes}
    assert {"prefill", "decode", "token_ms_p95", "compile_cold", "peak_bytes"} <= changes


def test_a_peer_with_weights_of_its_own_runs_no_other_model():
    assert peers.reason_absent("llama.cpp q4_1", "llama-1.1b") == "has weights of smollm2-135m only"


def test_the_best_static_scales_round_each_channel_by_its_own():
    x = torch.tensor([[1.0, 100.0, 0.0], [-0.5, 37.0, 0.0], [0.25, 64.0, 0.0]])
    rounding = static_bound._best(x, 6)
    assert ((rounding(x) - x).abs() <= 0.05 * x.abs()).all()
    ids = Tokenizer()("".join(map(chr, range(600)))).get("input_ids")
    results = list(static_bound.measure(tiny_llama(layers=1), torch.tensor([ids]), 4, 511))
    assert [each.inputs for each in results] == [
        *("all", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "lm_head",
    ]
    assert len({each.perplexity for each in results}) > 1
    assert {each.tokens for each in results} == {511}


def test_calibration_is_measured_by_size():
    small, large = calibrate.run("w4a4", "minmax", [1], [64, 128], 2, 8, threads=1)
    assert (small.hidden, large.hidden) == (64, 128)
    assert 0 < small.weights < large.weights
    assert small.seconds > 0
    assert small.peak_bytes > small.model_bytes > 0


def test_every_configuration_is_one_that_quantize_takes():
    for configuration in accuracy.CONFIGURATIONS.values():
        assert configuration.method in (None, *METHODS)


@pytest.mark.parametrize(
    "name",
    [
        "accuracy",
        "bound",
        "calibrate",
        "compare",
        "digits",
        "families",
        "gemm",
        "machine",
        "model",
        "roofline",
        "sts",
    ],
)
def test_every_benchmark_is_a_command(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
