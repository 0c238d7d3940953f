"""What ``fp4compile.benchmark`` measured, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fp4compile.errors import EvaluationError
from fp4compile.evaluate import Spread


@dataclass(frozen=True)
class OpTime:
    """One kernel or op, all its calls in one forward together; ``seconds`` per forward."""

    name: str
    kind: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class Measured:
    """Seconds of one forward, and the parts of it by falling time, outside of kernels included."""

    seconds: Spread
    ops: tuple[OpTime, ...]

    @property
    def kinds(self) -> dict[str, float]:
        """Share of the time by kind of work, the largest first."""
        found: dict[str, float] = {}
        for op in self.ops:
            found[op.kind] = found.get(op.kind, 0.0) + op.share
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Benchmark:
    """A quantized model beside the same in high precision (``baseline``, None: not measured).

    ``inputs``: shapes of the forward's tensors by name.
    """

    inputs: Mapping[str, tuple[int, ...]]
    threads: int
    repetitions: int
    quantized: Measured
    baseline: Measured | None
    baseline_dtype: str | None

    @property
    def speedup(self) -> float | None:
        """Median time of the baseline over that of the quantized model."""
        if self.baseline is None:
            return None
        return self.baseline.seconds.median / self.quantized.seconds.median

    @property
    def dominating(self) -> OpTime:
        """The op that takes the most time."""
        return self.quantized.ops[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "speedup": self.speedup}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Benchmark:
        """What :meth:`to_dict` made; other keys are left.

        Raises:
            EvaluationError: ``content`` is no benchmark.
        """
        try:
            baseline = content["baseline"]
            return cls(
                {name: tuple(shape) for name, shape in content["inputs"].items()},
                content["threads"],
                content["repetitions"],
                _measured_from(content["quantized"]),
                None if baseline is None else _measured_from(baseline),
                content["baseline_dtype"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"this is no benchmark ({type(error).__name__} {error}); give what "
                "fp4compile bench --json wrote"
            ) from error

    def summary(self) -> str:
        """A few lines: the times, the kinds of work, the op that dominates."""
        lines = [f"quantized: {_milliseconds(self.quantized.seconds)}"]
        if self.baseline is not None and self.speedup is not None:
            lines.append(f"{self.baseline_dtype}: {_milliseconds(self.baseline.seconds)}")
            lines.append(f"speedup: {self.speedup:.2f}")
        lines += [f"  {share:5.1%} {kind}" for kind, share in self.quantized.kinds.items()]
        top = self.dominating
        lines.append(f"most time: {top.name}, {top.calls:.0f} calls, {top.share:.1%}")
        return "\n".join(lines)


def _measured_from(content: Mapping[str, Any]) -> Measured:
    ops = tuple(OpTime(**op) for op in content["ops"])
    return Measured(Spread(**content["seconds"]), ops)


def _milliseconds(spread: Spread) -> str:
    low, high = 1e3 * spread.low, 1e3 * spread.high
    return f"{1e3 * spread.median:.2f} ms ({low:.2f} to {high:.2f})"
