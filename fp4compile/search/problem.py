"""What a search method gets: one group of sites that share an activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fp4compile.errors import SpecError
from fp4compile.qparams import (
    FEWEST_TOKENS,
    SAMPLE_TOKENS,
    QuantSpec,
    Statistics,
    WeightQParams,
)

ROUNDINGS = ("compensated", "nearest")
SHIFT_CHOICES = ("error", "maximum")
TOKEN_WEIGHTS = ("power", "gradient")


@dataclass(frozen=True)
class SearchOptions:
    """What a search does beyond formats and scales; the defaults are what measured best.

    ``rounding``: ``"compensated"`` (GPTQ) or ``"nearest"`` (the paper). ``shift_choice``: exponent
    shifts of an activation by each channel's ``"error"`` or by its ``"maximum"`` (the paper).
    ``rounds``: how often weights and activations are searched in turn.

    ``sink_power``: in the output error a token counts by ``1 / (power + sink_power * mean power)``
    of its output; infinity counts all the same. ``weight_sink_power``: the same for the second
    moment that weights are rounded by, which may rest on sinks more.

    ``unseen``: a static scale reckons with so many times as many tokens as calibration saw, some of
    them larger; 0 for none. ``moment_shrinkage``: how much of the correlation between channels that
    chance may explain is left out of that second moment, see ``shrunk_moment``; 0 for nothing.

    ``lookup_weight``: how much the relative error of looked-up rows counts beside that of the
    head's output where an embedding is tied to a head. What a head adds reaches the logits as it
    is; what a look-up adds is diluted by all layers.

    ``format_margin``: an activation format that runs on the int8 route is preferred while its error
    is at most ``1 + format_margin`` times the best one's.

    ``balance``: exponent shifts may move from activations into weights (``"best"``, and ``"fpq"``
    where activations have more than 4 bits). ``largest_rotation``: of the Hadamard matrices
    of ``"best"``; 1 for none. ``rotate``: ``"fpq"`` tries them too, with shifts in the weights, and
    takes them where the error on held-out tokens is less.

    ``tie_shifts``: channels that come from one row of their producer (query heads that share a head
    of values) get one exponent shift, so that it folds. Otherwise each has its own, and
    the multiplication is part of the kernel that rounds the activation.

    ``token_weights``: ``"gradient"`` counts tokens, in the second moment that weights are rounded
    by, by how much errors there move the model's outputs (Fisher information), for which every
    sample is run forth and back once; ``"power"`` as ``weight_sink_power`` says.

    ``sample_tokens``: of all calibration tokens so many decide, drawn at random; fewer where
    ``max_memory`` is less. Memory and time of the search grow with them.
    """

    rounding: str = "compensated"
    shift_choice: str = "error"
    rounds: int = 3
    sink_power: float = 0.1
    weight_sink_power: float = 16.0
    unseen: float = 1.0
    moment_shrinkage: float = 2.0
    lookup_weight: float = 0.05
    format_margin: float = 0.02
    largest_rotation: int = 512
    balance: bool = True
    rotate: bool = False
    tie_shifts: bool = False
    token_weights: str = "power"
    sample_tokens: int = SAMPLE_TOKENS

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise SpecError(f"rounding {self.rounding!r} is not one of {ROUNDINGS}")
        if self.shift_choice not in SHIFT_CHOICES:
            raise SpecError(f"shift_choice {self.shift_choice!r} is not one of {SHIFT_CHOICES}")
        if self.token_weights not in TOKEN_WEIGHTS:
            raise SpecError(f"token_weights {self.token_weights!r} is not one of {TOKEN_WEIGHTS}")
        amounts = (
            *(self.sink_power, self.weight_sink_power, self.unseen, self.moment_shrinkage),
            *(self.lookup_weight, self.format_margin),
        )
        if self.sample_tokens < FEWEST_TOKENS:
            raise SpecError(
                f"sample_tokens={self.sample_tokens} decide nothing; give {FEWEST_TOKENS} or more"
            )
        if self.rounds < 1 or min(amounts) < 0:
            raise SpecError(f"rounds must be at least 1 and the rest not negative, got {self}")


@dataclass(frozen=True)
class GroupProblem:
    """``weights``: float32 ``[N, K]`` by site name; ``statistics`` of their common input.

    ``tied`` names those that are also looked up as an embedding, ``heads`` those whose outputs are
    logits. ``decided`` holds weights that may
    not change any more (a tied head, when earlier layers were already calibrated on its rows).
    ``channel_ties`` int64 ``[K]``: channels with the same number get the same exponent shift.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics
    spec: QuantSpec
    tied: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()
    decided: Mapping[str, WeightQParams] = field(default_factory=dict)
    options: SearchOptions = field(default_factory=SearchOptions)
    channel_ties: Tensor | None = None

    def thinned(self, rows: int) -> GroupProblem:
        """The same with about ``rows`` evenly spaced rows of all weights together."""
        step = max(1, sum(len(weight) for weight in self.weights.values()) // rows)
        return replace(self, weights={name: w[::step] for name, w in self.weights.items()})
