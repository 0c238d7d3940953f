"""What a target may look at to accept, decline or render: a GEMM, or an activation's rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp4compile.blocks import block_count
from fp4compile.formats import FloatFormat, alternatives
from fp4compile.packing import codes_per_group, packed_size

INT8, FLOAT = "int8", "float"
_BFLOAT16_PARTS = {torch.int8: 1, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@dataclass(frozen=True)
class GemmProblem:
    """``y[M, N] = operand[M, K] . weight[N, K]``, then scales and bias. M is a run-time value."""

    N: int
    K: int
    weight_format: str
    operand_dtype: torch.dtype
    operand_scale: str | None  # "tensor" (0-d), "token" ([M, 1]), "block" ([M, blocks]) or None
    block_size: int  # of the weight's block scales; 0 without
    bias: bool
    out_dtype: torch.dtype
    device: str = "cpu"
    architecture: str = ""  # of a GPU, "sm_90" or "gfx942"
    experts: int = 0  # of a stack of weights, each of which has rows of its own; 0: one weight
    operand_format: str = ""  # whose integer values the operand holds; "" if unknown
    shift_block: int = 0  # neighbours that share an exponent shift in the operand; 0 without shifts

    @property
    def formats(self) -> tuple[FloatFormat, ...]:
        """The weight's format; with blocks perhaps two, between which every block chooses."""
        return alternatives(self.weight_format)

    @property
    def format(self) -> FloatFormat:
        """The first of :attr:`formats`."""
        return self.formats[0]

    @property
    def blocks(self) -> int:
        """Block scales of a row of the weight."""
        return block_count(self.K, self.block_size) if self.block_size else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row of the weight."""
        return packed_size(self.K, self.format.bits)

    @property
    def group_codes(self) -> int:
        """Codes of the weight that fill a whole number of bytes."""
        return codes_per_group(self.format.bits)

    @property
    def route(self) -> str:
        """ "int8" sums int8 products exactly in int32; "float" sums in float32."""
        fits = all(fmt.fits_int8 for fmt in self.formats)
        return INT8 if self.operand_dtype == torch.int8 and fits else FLOAT

    @property
    def largest_operand(self) -> int:
        """Bound on the magnitude of an int8 operand."""
        if not self.operand_format or self.shift_block:
            return 128
        return min(128, max(fmt.max_integer for fmt in alternatives(self.operand_format)))

    @property
    def largest_sum(self) -> int:
        """Bound on a sum of int8 operands times weights, made unsigned by adding their maximum."""
        return 128 * (self.block_size or self.K) * 2 * max(f.max_integer for f in self.formats)

    @property
    def bfloat16_parts(self) -> int:
        """How many bfloat16, of 8 significant bits each, hold an operand exactly."""
        return _BFLOAT16_PARTS[self.operand_dtype]

    def __str__(self) -> str:
        dtype = str(self.operand_dtype).removeprefix("torch.")
        scale = f" scale/{self.operand_scale}" if self.operand_scale else ""
        blocks = f" blocks of {self.block_size}" if self.block_size else ""
        stack = f"grouped linear E={self.experts}" if self.experts else "linear"
        return (
            f"{stack} N={self.N} K={self.K} {dtype}{scale} x {self.weight_format}{blocks}"
            f"{' + bias' if self.bias else ''} -> {str(self.out_dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class ActivationProblem:
    """One call of ``fp4::quantize_activation`` on ``x[M, K]``; see there. M is a run-time value."""

    K: int
    dtype: torch.dtype
    format: str
    granularity: str
    shifts: bool  # x comes unshifted and is multiplied by 2^-shift
    shifts_back: bool  # the operand is multiplied by 2^shift
    rotation: int
    block_size: int
    block_clip: float

    @property
    def formats(self) -> tuple[FloatFormat, ...]:
        """The format; for blocks perhaps two."""
        return alternatives(self.format)

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return block_count(self.K, self.block_size) if self.granularity == "block" else 1

    @property
    def clips(self) -> tuple[float, ...]:
        """Maxima that a block may take, as factors of its own."""
        return (1.0,) if self.block_clip == 1.0 else (1.0, self.block_clip)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        blocks = f" of {self.block_size}" if self.granularity == "block" else ""
        rotation = f", rotation {self.rotation}" if self.rotation > 1 else ""
        return (
            f"quantize_activation K={self.K} {dtype} -> {self.format} "
            f"per {self.granularity}{blocks}{rotation}"
        )


@dataclass(frozen=True)
class AttentionProblem:
    """One call of ``fp4::attend``: ``rows`` queries per head (None: any number) of ``head``
    channels. Batch, heads and length are run-time values.
    """

    rows: int | None
    head: int
    dtype: torch.dtype
    scale: float
    causal: bool
    rows_first: bool
    device: str

    def __str__(self) -> str:
        rows = "any" if self.rows is None else self.rows
        return f"attend {rows} x {self.head} {str(self.dtype).removeprefix('torch.')}"


def bfloat16_bits(value: int) -> int:
    """The bits of ``value`` as a bfloat16."""
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.uint16))
