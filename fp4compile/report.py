"""What was done to every parameter, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from statistics import median
from typing import Any

from fp4compile.attention_products import AttentionDecision
from fp4compile.batches import Batch
from fp4compile.kernels import KernelChoice
from fp4compile.passes.plan import Rewrite
from fp4compile.qparams import QuantSpec
from fp4compile.recipe import Recipe
from fp4compile.tensor import FP4Tensor
from fp4compile.trace import Site, bias_node


@dataclass(frozen=True)
class SiteReport:
    """One quantized weight. ``error`` is the relative error of the layer's output on calibration
    tokens, ``minmax_error`` what min-max in the standard format of the width would give; of an
    embedding alone, that of its rows. ``bias``: whether the linear adds one; None if there is none.
    ``unreached_experts``: those of a stack that calibration brought no token.
    ``shift_fused_because``: why the kernel that rounds the activation multiplies with its exponent
    shifts, if no producer took them.
    """

    name: str
    shape: tuple[int, ...]
    weight_format: str
    activation_format: str | None
    granularity: str | None
    rotation: int
    shifted_channels: int
    shift_folded_into: str | None
    error: float
    minmax_error: float
    bytes: int
    bias: bool | None
    unreached_experts: tuple[int, ...] = ()
    shift_fused_because: str | None = None


@dataclass(frozen=True)
class AttentionReport:
    """One attention whose products run on rounded operands: its module, the format of every
    operand, and the relative error of its output, beside that of min-max.
    """

    name: str
    formats: Mapping[str, str]
    error: float
    minmax_error: float


@dataclass(frozen=True)
class Report:
    """``model`` is the model's class. ``sites`` that are FP4 now; ``skipped`` parameters of two or
    more dimensions, each with its reason; ``recipe`` repeats the run; ``kernels`` (after compiling)
    names the kernel of every site that is multiplied with; ``example``: the call that the model was
    traced with; ``attention``: whose products are quantized too.
    """

    model: str
    spec: QuantSpec
    method: str
    sites: tuple[SiteReport, ...]
    skipped: Mapping[str, str]
    seconds: float
    recipe: Recipe
    kernels: Mapping[str, KernelChoice] = field(default_factory=dict)
    example: Batch | None = field(default=None, repr=False)
    attention: tuple[AttentionReport, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and shifts per quantized weight."""
        weights = sum(prod(site.shape) for site in self.sites)
        return 8 * sum(site.bytes for site in self.sites) / max(weights, 1)

    def summary(self) -> str:
        """A few lines for the log."""
        errors = [site.error for site in self.sites if site.activation_format is not None]
        lines = [
            f"{len(self.sites)} weights quantized ({self.method}, "
            f"{self.bits_per_weight:.2f} bits per weight, {self.seconds:.0f} s), "
            f"{sum(site.shift_folded_into is not None for site in self.sites)} with exponent "
            f"shifts folded into their producer"
        ]
        if errors:
            lines[0] += f", median relative output error {median(errors):.4f}"
        if self.attention:
            worst = max(self.attention, key=lambda product: product.error)
            lines.append(
                f"products of {len(self.attention)} attentions quantized, largest relative output "
                f"error {worst.error:.4f} ({worst.name})"
            )
        lines += [
            f"{site.name}: calibration brought experts {_some(site.unreached_experts)} no token; "
            "they were quantized by their weights alone"
            for site in self.sites
            if site.unreached_experts
        ]
        reasons = Counter(site.shift_fused_because for site in self.sites)
        lines += [
            f"exponent shifts at {count} weights multiply as the activation is rounded: {why}"
            for why, count in reasons.items()
            if why is not None
        ]
        lines += [f"in high precision: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the recipe and the example, as plain values."""
        return {
            "model": self.model,
            "spec": asdict(self.spec),
            "method": self.method,
            "seconds": self.seconds,
            "bits_per_weight": self.bits_per_weight,
            "sites": [asdict(site) for site in self.sites],
            "attention": [asdict(product) for product in self.attention],
            "skipped": dict(self.skipped),
            "kernels": {name: asdict(choice) for name, choice in self.kernels.items()},
        }


def _some(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def make_report(
    rewrite: Rewrite,
    spec: QuantSpec,
    method: str,
    seconds: float,
    attention: Mapping[str, AttentionDecision],
) -> Report:
    """The report of a finished rewrite."""
    producer = {site: name for name, sites in rewrite.folded.items() for site in sites}
    sites = tuple(
        _site_report(rewrite, site, producer.get(site.name))
        for site in rewrite.graph.sites
        if site.name in rewrite.qparams
    )
    undecided = {
        site.name: "the recipe does not name it"
        for site in rewrite.graph.sites
        if site.name not in rewrite.qparams
    }
    skipped = {**rewrite.graph.skipped, **undecided}
    recipe = Recipe(rewrite.qparams, skipped)
    products = tuple(
        AttentionReport(
            name,
            {operand: qparams.format for operand, qparams in made.operands.items()},
            made.error,
            made.minmax_error,
        )
        for name, made in attention.items()
    )
    name = type(rewrite.model).__name__
    report = Report(name, spec, method, sites, skipped, seconds, recipe, attention=products)
    return replace(report, recipe=replace(recipe, report=report.to_dict()))


def _site_report(rewrite: Rewrite, site: Site, producer: str | None) -> SiteReport:
    decision, tensor = rewrite.qparams[site.name], rewrite.parameters[site.name]
    assert isinstance(tensor, FP4Tensor)
    activation = decision.activation
    shift = None if activation is None else activation.exponent_shift
    return SiteReport(
        name=site.name,
        shape=tuple(tensor.shape),
        weight_format=decision.weight.format,
        activation_format=None if activation is None else activation.format,
        granularity=None if activation is None else activation.granularity,
        rotation=1 if activation is None else activation.rotation,
        shifted_channels=0 if shift is None else int((shift != 0).sum()),
        shift_folded_into=producer,
        shift_fused_because=None if shift is None else rewrite.unfolded.get(site.name),
        error=decision.error,
        minmax_error=decision.minmax_error,
        bytes=tensor.stored_bytes,
        bias=bias_node(site.linears[0]) is not None if site.linears else None,
        unreached_experts=decision.unreached,
    )
