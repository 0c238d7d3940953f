"""The two products of attention on rounded operands: queries with keys, probabilities with values.

LLM-FP4's tables of BERT and ViT quantize them as well: every operand has one static scale per
tensor and a format of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile import ops
from fp4compile.formats import FloatFormat
from fp4compile.numerics import scale_for_max
from fp4compile.qparams import ActivationQParams, TensorSpec
from fp4compile.search.candidates import minmax_format
from fp4compile.search.grid import clip_factors

OPERANDS = ("query", "key", "probability", "value")
# As of an activation, coarser: what is judged is a whole attention, not a linear.
OCTAVES_BELOW = 6.0
STEPS_PER_OCTAVE = {4: 4, 6: 2, 8: 1}


class AttentionProducts(nn.Module):
    """Formats and float32 0-d scales of the four operands of one attention.

    The buffers are not persistent: what saves a model saves the numbers (``to_dict``).
    """

    def __init__(self, operands: Mapping[str, ActivationQParams]) -> None:
        super().__init__()
        self.formats = {name: operands[name].format for name in OPERANDS}
        for name in OPERANDS:
            scale = operands[name].scale.to(torch.float32).clone()
            self.register_buffer(f"{name}_scale", scale, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionProducts:
        # ``model.to(dtype)`` means the model's own numbers: of a cast only the device is taken.
        for name, held in self.named_buffers():
            setattr(self, name, held.to(fn(held).device))
        return self

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """``x`` as operand ``name``, float32."""
        operand, scale = ops.quantize_activation(
            x, self.get_buffer(f"{name}_scale"), None, self.formats[name], "tensor"
        )
        # The scale multiplies before the product: sums of 16-bit operands are float32 in any case.
        return operand.to(torch.float32) * scale

    def to_dict(self) -> dict[str, tuple[str, float]]:
        """(format, scale) of every operand; the inverse of :meth:`from_dict`."""
        return {
            name: (self.formats[name], float(self.get_buffer(f"{name}_scale"))) for name in OPERANDS
        }

    @classmethod
    def from_dict(cls, operands: Mapping[str, Sequence[str | float]]) -> AttentionProducts:
        made = {
            name: ActivationQParams(str(format), "tensor", torch.tensor(float(scale)))
            for name, (format, scale) in operands.items()
        }
        return cls(made)


@dataclass(frozen=True)
class AttentionCall:
    """What an attention computes its output of.

    ``query`` is ``[B, H, L, D]``, ``key`` and ``value`` are ``[B, H / groups, S, D]``; ``mask`` is
    added and broadcasts with ``[B, H, L, S]``; ``softcap`` bounds the scores: ``softcap *
    tanh(scores / softcap)``; ``sinks`` ``[H]`` are scores of a key without value (gpt-oss).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    sinks: Tensor | None = None

    def rows(self, number: int) -> AttentionCall:
        """The first of the batch, float32 on the CPU; a mask may be the same for all."""
        parts = {name: getattr(self, name) for name in ("query", "key", "value", "mask")}
        kept = {name: x[:number].float().cpu() for name, x in parts.items() if x is not None}
        sinks = None if self.sinks is None else self.sinks.detach().float().cpu()
        return replace(self, **kept, sinks=sinks)


def attention(
    call: AttentionCall, products: AttentionProducts | None = None
) -> tuple[Tensor, Tensor]:
    """(``softmax(query key^T * scaling + mask) value``, the probabilities), in the query's dtype.

    ``products`` rounds the operands; None: full precision.
    """
    q, k, v = call.query, call.key, call.value
    if products is not None:
        rounded = {"query": q, "key": k, "value": v}
        q, k, v = (products.rounded(name, x) for name, x in rounded.items())
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    scores = q @ k.mT * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask is not None:
        scores = scores + call.mask
    if call.sinks is not None:
        sinks = call.sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    probability = scores.softmax(dim=-1, dtype=torch.float32)[..., : k.shape[-2]]
    p = probability if products is None else products.rounded("probability", probability)
    return (p.to(v.dtype) @ v).to(call.query.dtype), probability


@dataclass(frozen=True)
class AttentionSample:
    """A ``call`` of one attention and its ``output`` in full precision; all tensors float32."""

    call: AttentionCall
    output: Tensor


@dataclass(frozen=True)
class AttentionStatistics:
    """``absmax`` by operand over all of calibration, and some ``samples``."""

    absmax: Mapping[str, Tensor]
    samples: Sequence[AttentionSample]


class AttentionObserver:
    """Sees the calls of one attention in full precision; keeps the first ``rows`` of each."""

    def __init__(self, calls: int = 2, rows: int = 4) -> None:
        self._calls, self._rows = calls, rows
        self._absmax = {name: torch.zeros(()) for name in OPERANDS}
        self._samples: list[AttentionSample] = []

    def update(self, call: AttentionCall, probability: Tensor, output: Tensor) -> None:
        """See one call with what came of it."""
        values = dict(zip(OPERANDS, (call.query, call.key, probability, call.value), strict=True))
        for name, x in values.items():
            self._absmax[name] = torch.maximum(self._absmax[name], x.abs().amax().float().cpu())
        if len(self._samples) < self._calls:
            few = output[: self._rows].float().cpu()
            self._samples.append(AttentionSample(call.rows(self._rows), few))

    @property
    def value(self) -> AttentionStatistics:
        return AttentionStatistics(dict(self._absmax), tuple(self._samples))


@dataclass(frozen=True)
class AttentionDecision:
    """Operands of one attention's products, and the squared error of its output relative to the
    output's square on the samples, beside that of min-max.
    """

    operands: Mapping[str, ActivationQParams]
    error: float
    minmax_error: float


def search_attention(
    statistics: AttentionStatistics, spec: TensorSpec, *, minmax: bool = False, rounds: int = 2
) -> AttentionDecision:
    """Format and clipping of every operand, in turn, by the error of the attention's output.

    Args:
        minmax: search nothing.
    """
    base = {name: _static(minmax_format(spec), statistics.absmax[name]) for name in OPERANDS}
    best, error = base, _error(statistics.samples, base)
    first = error
    for _ in range(0 if minmax else rounds):
        for name in OPERANDS:
            for candidate in _candidates(statistics.absmax[name], spec):
                tried = {**best, name: candidate}
                found = _error(statistics.samples, tried)
                if found < error:
                    best, error = tried, found
    return AttentionDecision(best, error, first)


def _static(fmt: FloatFormat, maximum: Tensor) -> ActivationQParams:
    return ActivationQParams(fmt.name, "tensor", scale_for_max(maximum, fmt))


def _candidates(absmax: Tensor, spec: TensorSpec) -> list[ActivationQParams]:
    factors = clip_factors(STEPS_PER_OCTAVE[spec.bits], OCTAVES_BELOW)
    return [_static(fmt, absmax * factor) for fmt in spec.candidates for factor in factors]


def _error(samples: Sequence[AttentionSample], operands: Mapping[str, ActivationQParams]) -> float:
    products = AttentionProducts(operands)
    wrong = power = 0.0
    for sample in samples:
        found, _ = attention(sample.call, products)
        wrong += float((found - sample.output).square().sum())
        power += float(sample.output.square().sum())
    return wrong / max(power, torch.finfo().tiny)
