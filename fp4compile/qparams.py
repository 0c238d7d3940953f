"""What is asked (:class:`QuantSpec`) and what is decided (``*QParams``), as frozen values.

THE dequantization equation, for an activation ``x`` ``[M, K]`` and a weight ``w`` ``[N, K]``:

    x[m, k] ~ activation.scale[m] * 2^exponent_shift[k] * integer_value(code_x[m, k])
    w[n, k] ~ weight.scale[n] * integer_value(code_w[n, k])

With ``shift_in_weight`` or a rotation ``H`` both are first transformed, which leaves ``x w^T`` as
it is: ``x' = H (x * 2^-shift)`` and ``w' = H (w * 2^shift)``. With blocks the scales also depend
on the block of k (``blocks.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fp4compile.errors import SpecError
from fp4compile.formats import FloatFormat, by_name, of_width

GRANULARITIES = ("channel", "tensor", "token", "block")
BLOCK_SIZES = (16, 32, 64, 128)
# Of statistics: all tokens of the default calibration, a sample of longer ones.
SAMPLE_TOKENS = 8192
# With less a search would fit chance.
FEWEST_TOKENS = 512


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor may be quantized: the width, the formats to choose from (all of the width
    when empty), what shares one scale, and whether channels get integer exponent shifts.

    ``block_size`` neighbours along K share an E4M3 scale if the granularity is ``"block"``;
    ``formats`` then names one format, or two between which every block chooses.
    """

    bits: int
    formats: tuple[str, ...] = ()
    granularity: str = "channel"
    exponent_shift: bool = False
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise SpecError(f"granularity {self.granularity!r} is not one of {GRANULARITIES}")
        if self.granularity == "block":
            self._check_block()
        elif self.block_size:
            raise SpecError(f"block_size={self.block_size} needs granularity='block'")
        wrong = [name for name in self.formats if by_name(name).bits != self.bits]
        if wrong:
            raise SpecError(
                f"formats {wrong} do not have {self.bits} bits; leave formats empty "
                "to let the search choose among all of the width"
            )
        of_width(self.bits)

    def _check_block(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise SpecError(f"block_size {self.block_size} is not one of {BLOCK_SIZES}")
        if not 1 <= len(self.formats) <= 2:
            raise SpecError(
                f"block scales need one format, or two to choose from per block, got "
                f"{self.formats}; give formats=('e2m1', 'e1m2')"
            )

    @property
    def candidates(self) -> tuple[FloatFormat, ...]:
        """The formats that the search may choose from."""
        return tuple(by_name(name) for name in self.formats) or of_width(self.bits)


@dataclass(frozen=True)
class QuantSpec:
    """Bits and granularity per role. ``activation`` None keeps activations in their dtype.
    ``embedding`` None keeps embeddings (and a head tied to one) in high precision.
    """

    weight: TensorSpec
    activation: TensorSpec | None
    embedding: TensorSpec | None

    def __post_init__(self) -> None:
        if self.activation is not None and self.activation.granularity == "channel":
            raise SpecError(
                "an activation has one scale per tensor, token or block; give its TensorSpec "
                "granularity='tensor' (static), 'token' or 'block' (dynamic)"
            )
        for spec in (self.weight, self.embedding):
            if spec is not None and (
                spec.granularity not in ("channel", "block") or spec.exponent_shift
            ):
                raise SpecError(
                    "weights and embeddings have one scale per output channel or per block and "
                    f"no exponent shifts of their own, got {spec}; leave granularity and "
                    "exponent_shift out"
                )
        blocks = {s.block_size for s in (self.weight, self.activation) if s and s.block_size}
        if len(blocks) > 1 or (
            self.activation is not None
            and self.activation.granularity == "block"
            and self.weight.granularity != "block"
        ):
            raise SpecError(
                "an activation with block scales needs a weight with blocks of the same size, "
                f"got {self.weight} and {self.activation}"
            )

    @classmethod
    def preset(cls, name: str) -> QuantSpec:
        """``w4a4``, ``w4a8``, ``w4a16``, ``w6a6`` or ``w8a8``: weight and activation bits.

        Embedding and head follow the weights, as in the E/W/A columns of LLM-FP4's tables;
        weights have a scale per output channel, activations one static scale per tensor and
        integer exponent shifts per channel.

        Raises:
            SpecError: there is no such preset.
        """
        if name not in _PRESET_BITS:
            raise SpecError(f"unknown spec {name!r}; presets are {', '.join(_PRESET_BITS)}")
        weight_bits, activation_bits = _PRESET_BITS[name]
        weight = TensorSpec(weight_bits)
        activation = (
            None
            if activation_bits == 16
            else TensorSpec(activation_bits, granularity="tensor", exponent_shift=True)
        )
        return cls(weight, activation, weight)

    def per_token(self) -> QuantSpec:
        """The same with dynamic activation scales, one per token."""
        if self.activation is None:
            raise SpecError("a spec without activation quantization has no activation scales")
        return replace(self, activation=replace(self.activation, granularity="token"))


_PRESET_BITS = {"w4a4": (4, 4), "w4a8": (4, 8), "w4a16": (4, 16), "w6a6": (6, 6), "w8a8": (8, 8)}
PRESETS = tuple(_PRESET_BITS)


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one activation ``x`` of K channels.

    ``absmax`` ``[K]``; ``second_moment`` ``[K, K]`` = mean of ``x x^T`` over ``tokens`` tokens
    (``[0, 0]`` where nothing asked for it); ``sample`` ``[T, K]``, a uniform sample of them;
    ``sensitivity`` ``[T]`` of these, where it was asked for. All float32.
    """

    absmax: Tensor
    second_moment: Tensor
    sample: Tensor
    tokens: int
    sensitivity: Tensor | None = None

    def last_column_taken(self) -> tuple[Statistics, Tensor]:
        """Without the last channel, and the sample of that."""
        column = self.sample[:, -1]
        rest = self.sample[:, :-1].contiguous()
        return replace(self, absmax=self.absmax[:-1], sample=rest), column

    def with_sensitivity(self) -> Statistics:
        """The last channel taken as ``sensitivity``."""
        rest, column = self.last_column_taken()
        return replace(rest, sensitivity=column)


@dataclass(frozen=True)
class WeightQParams:
    """Format name and float32 scale ``[N]`` of a weight ``[N, K]``; with block scales two names
    joined by ``|`` perhaps, the outer scale ``[1]`` and the codes ``block_scale`` uint8
    ``[N, blocks]``.

    ``packed`` uint8 ``[N, packed_size(K)]``: the codes, where they are not those of rounding to
    nearest. Of a stack of experts all have one dimension more, and the outer scale is
    ``[E, 1, 1]``.
    """

    format: str
    scale: Tensor
    block_scale: Tensor | None = None
    block_size: int = 0
    packed: Tensor | None = None


@dataclass(frozen=True)
class ActivationQParams:
    """Format name, granularity, and the float32 0-d ``scale`` that
    ``fp4::quantize_activation`` takes (static scale, clip ratio per token, or outer scale of
    blocks); int8 ``exponent_shift`` ``[K]`` or None; whether 2^-shift is folded into the producer
    and whether 2^shift is in the weight; size of the Hadamard rotation; block size and clip.
    """

    format: str
    granularity: str
    scale: Tensor
    exponent_shift: Tensor | None = None
    shift_folded: bool = False
    shift_in_weight: bool = False
    rotation: int = 1
    block_size: int = 0
    block_clip: float = 1.0


@dataclass(frozen=True)
class Diagnosis:
    """What a report shows of a decision and nothing computes with: ``channel_absmax`` float32
    ``[K]`` of the site's input, and relative output errors with only the weight and only the
    activation quantized.
    """

    channel_absmax: Tensor
    weight_error: float
    activation_error: float


@dataclass(frozen=True)
class SiteQParams:
    """The decision for one site, with its relative output error (mean squared error of the
    layer output over its mean square, on calibration tokens) beside that of min-max; ``unreached``
    are the experts that calibration brought no token, decided by their weights alone.
    """

    weight: WeightQParams
    activation: ActivationQParams | None
    error: float
    minmax_error: float
    unreached: tuple[int, ...] = ()
    diagnosis: Diagnosis | None = None
