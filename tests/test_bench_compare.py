"""``bench compare`` flags what is beyond noise, and nothing else; ``bench machine`` describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.compare import LESS_IS_BETTER, compare
from bench.machine import measure_machine


def spread(median: float, width: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - width), "high": median * (1 + width)}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdict(tmp_path: Path, field: str, before: Any, after: Any, **options: float) -> str:
    row = {"name": "fp4", "M": 1, "threads": 2}
    old = written(tmp_path / "a.jsonl", {**row, field: before})
    new = written(tmp_path / "b.jsonl", {**row, field: after})
    (change,) = compare(old, new, **options).changes
    return change.verdict


@pytest.mark.parametrize("field", LESS_IS_BETTER)
def test_a_change_beyond_noise_is_judged_by_the_fields_direction(
    field: str, tmp_path: Path
) -> None:
    more, less = ("worse", "better") if LESS_IS_BETTER[field] else ("better", "worse")
    assert verdict(tmp_path, field, spread(1.0), spread(1.2)) == more
    assert verdict(tmp_path, field, spread(1.2), spread(1.0)) == less
    assert verdict(tmp_path, field, spread(1.0), spread(1.0)) == "same"
    assert verdict(tmp_path, field, 10.0, 12.0) == more


def test_overlapping_ranges_are_noise_whatever_the_medians(tmp_path: Path) -> None:
    assert verdict(tmp_path, "timing", spread(1.0, 0.3), spread(1.4, 0.3)) == "same"


def test_small_changes_are_noise_whatever_the_ranges(tmp_path: Path) -> None:
    assert verdict(tmp_path, "perplexity", 48.95, 49.0) == "same"
    assert verdict(tmp_path, "perplexity", 48.95, 49.0, noise=0.0) == "worse"


def test_rows_are_told_apart_by_what_was_asked_not_by_what_was_measured(tmp_path: Path) -> None:
    rows = [
        {"name": "fp4", "M": m, "timing": spread(t), "gops": 1 / t, "machine": {"cpu": "x"}}
        for m, t in ((1, 1.0), (16, 4.0))
    ]
    old = written(tmp_path / "a.jsonl", *rows, {"name": "bf16", "M": 1, "timing": spread(3.0)})
    new = written(
        tmp_path / "b.jsonl", {**rows[1], "timing": spread(8.0), "gops": 9, "machine": {}}, rows[0]
    )
    found = compare(old, new)
    assert [(change.row, change.ratio) for change in found.regressions] == [("fp4 M=16", 2.0)]
    assert found.only_before == ("bf16 M=1",)
    assert found.only_after == ()


def test_nested_measurements_are_found(tmp_path: Path) -> None:
    row = {"name": "model", "speed": {"prefill": spread(500.0), "decode": spread(20.0)}}
    slower = {"name": "model", "speed": {"prefill": spread(500.0), "decode": spread(10.0)}}
    old, new = written(tmp_path / "a.jsonl", row), written(tmp_path / "b.jsonl", slower)
    (regression,) = compare(old, new).regressions
    assert regression.metric == "speed.decode"


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [(1.0, 0, "0 worse"), (2.0, 1, "worse: fp4: timing 1 -> 2"), (None, 2, "no row in common")],
    ids=["same", "worse", "other benchmark"],
)
def test_the_command_ends_with_1_on_a_regression(
    after: float | None, code: int, said: str, tmp_path: Path
) -> None:
    old = written(tmp_path / "a.jsonl", {"name": "fp4", "timing": spread(1.0)})
    other = {"name": "other"} if after is None else {"name": "fp4", "timing": spread(after)}
    new = written(tmp_path / "b.jsonl", other)
    result = CliRunner().invoke(app, ["compare", str(old), str(new)])
    assert result.exit_code == code
    assert said in result.output


def test_the_results_in_the_tree_can_be_compared() -> None:
    for path in sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.jsonl")):
        assert not compare(path, path).regressions


def test_the_machine_is_measured() -> None:
    found = measure_machine(1, repetitions=2, read_floats=1 << 12, gemm_size=64)
    content = json.loads(json.dumps(found.to_json()))
    assert content["machine"]["cpu"]
    assert set(content["peaks"]) == {"float32", "bfloat16", "int8"}
    for rate in (content["read_bandwidth"], *content["peaks"].values()):
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
