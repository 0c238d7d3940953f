"""Two files of results: what became worse by more than their noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Measured fields and whether less is better. A field with a spread is a mapping with "median",
# "low" and "high"; the last part of its path decides.
LESS_IS_BETTER = {
    "timing": True,
    "seconds": True,
    "perplexity": True,
    "peak_bytes": True,
    "bits_per_weight": True,
    "prefill": False,
    "decode": False,
    "tokens_per_second": False,
    "token_ms_p50": True,
    "token_ms_p95": True,
    "compile_cold": True,
    "compile_warm": True,
    "acc,none": False,
    "acc_norm,none": False,
    # Of bench machine: rates.
    "read_bandwidth": False,
    "float32": False,
    "bfloat16": False,
    "int8": False,
}
SPREAD = frozenset({"median", "low", "high"})
# Follow from what is measured, or say nothing about what was: no part of a row's identity.
DERIVED = frozenset(
    {
        "gops",
        "bandwidth_share",
        "peak_share",
        "layer_errors",
        "model_bytes",
        "machine",
        "tokens",
        "speedup",
        "weights",
        "acc_stderr,none",
        "acc_norm_stderr,none",
    }
)
# A value without a spread may differ by so much of itself: repeated runs of one commit did.
DEFAULT_NOISE = 0.05


@dataclass(frozen=True)
class Measure:
    """``low <= median <= high``; all the same for a value measured once."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One measurement of one row in both files. ``ratio`` is B over A, turned so that more than 1
    is worse; ``verdict`` is "worse", "better" or "same".
    """

    row: str
    metric: str
    before: Measure
    after: Measure
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """``changes`` of the rows that both have; the names of those that only one has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "worse"]


def compare(before: Path, after: Path, noise: float = DEFAULT_NOISE) -> Comparison:
    """Compare two JSON-lines files of ``python -m bench``.

    A change counts beyond noise if its median moves by more than ``noise`` and, where both have a
    spread, their ranges do not overlap. Of rows with the same identity the last one counts.

    Raises:
        ValueError: a line is no JSON object, or no row is in both files.
    """
    old, new = _read(before), _read(after)
    common = [row for row in old if row in new]
    if not common:
        raise ValueError(f"{before} and {after} have no row in common; compare the same benchmark")
    changes = tuple(
        _change(row, metric, old[row][metric], new[row][metric], noise)
        for row in common
        for metric in old[row]
        if metric in new[row]
    )
    return Comparison(
        changes,
        tuple(row for row in old if row not in new),
        tuple(row for row in new if row not in old),
    )


def _read(path: Path) -> dict[str, dict[str, Measure]]:
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        content = json.loads(line)
        if not isinstance(content, dict):
            raise ValueError(f"{path}, line {number} is no JSON object")
        fields = dict(_flattened(content))
        rows[_identity(fields)] = {
            name: _measure(value)
            for name, value in fields.items()
            if _last(name) in LESS_IS_BETTER and value is not None
        }
    return rows


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their path; a spread is a leaf."""
    for name, value in content.items():
        if isinstance(value, Mapping) and not set(value) >= SPREAD and name not in DERIVED:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _identity(fields: Mapping[str, Any]) -> str:
    parts = [
        str(value) if name == "name" else f"{name}={value}"
        for name, value in fields.items()
        if _last(name) not in LESS_IS_BETTER and _last(name) not in DERIVED
    ]
    return " ".join(parts)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _measure(value: Any) -> Measure:
    if isinstance(value, Mapping):
        return Measure(value["median"], value["low"], value["high"])
    return Measure(value, value, value)


def _change(row: str, metric: str, before: Measure, after: Measure, noise: float) -> Change:
    ratio = after.median / before.median if before.median else float("inf")
    if not LESS_IS_BETTER[_last(metric)]:
        ratio = 1 / ratio if ratio else float("inf")
    apart = before.high < after.low or after.high < before.low
    if not apart or 1 / (1 + noise) <= ratio <= 1 + noise:
        verdict = "same"
    else:
        verdict = "worse" if ratio > 1 else "better"
    return Change(row, metric, before, after, ratio, verdict)
