"""What static scales of activations reach when they may cheat, to judge searches by.

Every channel of every input of a linear gets the real scale and the format that are best for the
very tokens that are scored, by squared error; weights stay in full precision. A recipe has less
freedom: one scale per tensor, powers of two per channel, and other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile.batches import bundled
from fp4compile.demo_model import load_demo_model
from fp4compile.evaluate import perplexity
from fp4compile.formats import FloatFormat, of_width
from fp4compile.numerics import fake_quantize, scale_for_max
from fp4compile.search.grid import clip_factors
from fp4compile.search.sorted_errors import channel_errors
from fp4compile.texts import text_ids

STEPS_PER_OCTAVE, OCTAVES = 8, 24
# Linears whose inputs are held at a time.
AT_ONCE = 42
ALL = "all"


@dataclass(frozen=True)
class BoundResult:
    """``inputs``: the last module name of the linears whose inputs were rounded, or "all"."""

    bits: int
    inputs: str
    perplexity: float
    tokens: int


def run(bits: int, tokens: int) -> Iterator[BoundResult]:
    """A result for all linears, then one per kind."""
    model, tokenizer = load_demo_model(None, torch.float32)
    ids = text_ids(tokenizer, bundled("heldout.txt"))
    yield from measure(model, ids, bits, tokens)


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor, bits: int, tokens: int) -> Iterator[BoundResult]:
    """Perplexity on the first ``tokens`` of ``ids``, on which the scales are chosen too."""

    def score() -> tuple[float, int]:
        result = perplexity(model, ids, max_tokens=tokens, progress=True)
        return result.perplexity, result.tokens

    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = list(linears)
    found: dict[str, _Rounding] = {}
    for start in range(0, len(names), AT_ONCE):
        some = {name: linears[name] for name in names[start : start + AT_ONCE]}
        found |= {name: _best(x, bits) for name, x in _inputs(some, score).items()}
    kinds = [ALL, *dict.fromkeys(name.rpartition(".")[2] for name in names)]
    for kind in kinds:
        chosen = {n: r for n, r in found.items() if kind in (ALL, n.rpartition(".")[2])}
        with _hooked({linears[name]: rounding.replace_input for name, rounding in chosen.items()}):
            yield BoundResult(bits, kind, *score())


def _inputs(linears: dict[str, nn.Module], run_model: Callable[[], Any]) -> dict[str, Tensor]:
    """``[tokens, K]`` of each."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].flatten(0, -2).to(torch.float32))

    with _hooked({module: keep(name) for name, module in linears.items()}):
        run_model()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@dataclass(frozen=True)
class _Rounding:
    """Channel k is rounded in format ``index[k]`` of ``formats`` with ``scale[k]``."""

    formats: Sequence[FloatFormat]
    index: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        result = x
        for number, fmt in enumerate(self.formats):
            rounded = fake_quantize(x, fmt, self.scale).to(x.dtype)
            result = torch.where(self.index == number, rounded, result)
        return result

    def replace_input(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook."""
        return (self(args[0]), *args[1:])


def _best(x: Tensor, bits: int) -> _Rounding:
    """Of least squared error for every channel of ``x`` ``[tokens, K]``."""
    formats = of_width(bits)
    maxima = x.abs().amax() * clip_factors(STEPS_PER_OCTAVE, OCTAVES, 0)
    tables = torch.stack(channel_errors(x, torch.ones(len(x)), maxima, formats))
    best = tables.flatten(0, 1).argmin(dim=0)
    index, place = best // len(maxima), best % len(maxima)
    scales = torch.stack([scale_for_max(maxima, fmt) for fmt in formats])
    return _Rounding(formats, index, scales[index, place])


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these see the inputs of their modules, and may replace them."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
