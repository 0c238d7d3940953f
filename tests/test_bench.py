"""The benchmarks run; no time is asserted."""

from __future__ import annotations

from bench import gemm
from bench.timing import interleave


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
    results = list(gemm.run([(32, 64)], [1, 3], threads=1, repetitions=2))
    names = ["fp4 w4a4", "fp4 w4a16", "bf16", "fp32"]
    assert [(r.M, r.name) for r in results] == [(m, name) for m in (1, 3) for name in names]
    assert all(result.gops > 0 for result in results)
