"""TritonTarget: what the GPU targets share, from declining a layout to choosing a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch

from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets.template import text

# From here on a column of programs, each for 32 rows of the weight, fills a GPU.
MANY_COLUMNS = 8192
# About what data-centre GPUs of the last generations have.
MULTIPROCESSORS = 128
FIRST_CAPABILITY = 80
AMD_TRIED = ("gfx942", "gfx950")
# Bytes of the widest load.
ALIGNMENT = 16
# A step of decoding: what is read of the weight decides the time.
FEW_ROWS = 16
# A kernel for few rows would serve many at a fraction of its speed, and the other way round: each
# class of numbers of rows, up to these, has kernels of its own.
ROW_CLASSES = (1, FEW_ROWS, 64, 512)
MANY_ROWS = 4096
# Bounds of the tiles that are tried: lanes, warps, sums of a lane, columns of a product.
WARP, MOST_WARPS, MOST_SUMS, SMALLEST_PRODUCT = 32, 8, 64, 16
# Its products take one operand from shared memory, so larger tiles fit the registers.
HOPPER = 90


def rows_of_each(problem: GemmProblem, rows: int) -> int:
    """How many of ``rows`` a weight gets, if experts of a stack are taken equally often."""
    return -(-rows // problem.experts) if problem.experts else rows


def row_class(is_at_most: Callable[[int], bool]) -> int:
    """The most rows of the class of a number of rows, of which ``is_at_most`` tells."""
    return next((most for most in ROW_CLASSES if is_at_most(most)), MANY_ROWS)


@dataclass(frozen=True)
class Tile:
    """What a program of the grid computes, and with how many warps; K is split ``split_k`` ways,
    and ``slices`` blocks of K are summed side by side.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    slices: int = 1
    group_m: int = 8


def candidates(tile: Tile, operand_bytes: int, shared_memory: int) -> list[Tile]:
    """``tile`` and its neighbours, for a choice by measurement: half and twice the columns, the
    warps, the pipeline's depth and the slices, as far as sums fit registers and a pipeline
    ``shared_memory`` (bytes).
    """
    changes = [
        {"block_n": tile.block_n * 2},
        {"block_n": tile.block_n // 2},
        {"num_warps": tile.num_warps // 2},
    ]
    if tile.block_m > 1:  # else there are no tensor cores and no pipeline
        changes += [
            {"num_warps": tile.num_warps * 2},
            {"num_stages": tile.num_stages + 1},
            {"num_stages": tile.num_stages - 1},
        ]
    if tile.slices > 1:
        changes.append({"slices": tile.slices * 2})
    others = [replace(tile, **change) for change in changes]
    return [tile, *(t for t in others if _fits(t, operand_bytes, shared_memory))]


def _fits(tile: Tile, operand_bytes: int, shared_memory: int) -> bool:
    # Weights are decoded to the operand's width before they are multiplied.
    step = (tile.block_m + tile.block_n) * tile.block_k * tile.slices * operand_bytes
    sums = tile.block_m * tile.block_n * tile.slices // (WARP * max(tile.num_warps, 1))
    return (
        tile.block_n >= (SMALLEST_PRODUCT if tile.block_m > 1 else 1)
        and 1 <= tile.num_warps <= MOST_WARPS
        and tile.num_stages >= 1
        and sums <= MOST_SUMS
        and step * tile.num_stages <= shared_memory
    )


@dataclass(frozen=True)
class TritonTarget:
    """A Triton kernel family. ``body`` names the text of its sum over K; ``declines`` gives its
    own reasons; ``parameters`` what the text takes beside the problem; ``tile`` the tile for M
    rows; ``few_rows`` the family that serves its problems up to that one's ``most_rows``. ``reads``
    names which of operand_outer and operand_shift its text reads; ``operand`` is the dtype in which
    it reads the operand, and a power of two that the operand is multiplied by, or None for the
    operand as it comes. Weights are ``decoded`` to that dtype by a kernel before it.
    """

    name: str
    body: str
    declines: Callable[[GemmProblem], str | None]
    parameters: Callable[[GemmProblem], dict[str, Any]]
    tile: Callable[[GemmProblem, int], Tile]
    reads: Callable[[GemmProblem], tuple[str, ...]] = lambda problem: ()
    bits: tuple[int, ...] = (4,)
    few_rows: TritonTarget | None = None
    most_rows: int = MANY_ROWS
    operand: Callable[[GemmProblem], tuple[torch.dtype, float] | None] = lambda problem: None
    decoded: bool = False

    def for_rows(self, problem: GemmProblem, rows: int) -> TritonTarget:
        """The family whose kernel computes ``rows`` rows of ``problem``."""
        few = self.few_rows
        if few is None or few.declines(problem):
            return self
        # A stack is not decoded as a whole: the most of its weights may have no row.
        if rows > few.most_rows and not (self.decoded and problem.experts):
            return self
        return few.for_rows(problem, rows)

    def supports(self, problem: GemmProblem) -> str | None:
        """None, or the reason for declining ``problem``."""
        return _layout_reason(problem, self.bits) or self.declines(problem)

    def exact_sums(self, problem: GemmProblem) -> bool:
        """Whether it sums in int32; else in float32."""
        return bool(self.parameters(problem)["SUM_TYPE"] == "tl.int32")

    def source(self, problem: GemmProblem, rows: Sequence[int] = ()) -> str:
        """Kernel text (jinja); only a tile's sizes are missing.

        ``rows``: of each weight, where the N of the problem are those of several.
        """
        parameters = {
            "N": problem.N,
            "ROWS": list(rows) or [problem.N],
            "K": problem.K,
            "BYTES": problem.row_bytes,
            # Triton's compiler for AMD does not choose among pointers to several buffers.
            "ADDRESSES": not capability(problem),
            "ROW_ALIGNMENT": gcd(problem.row_bytes, ALIGNMENT),
            "OPERAND_SCALE": problem.operand_scale or "",
            "BIAS": problem.bias,
            # One more than experts at least: see rows_of_expert.
            "LANES": 1 << problem.experts.bit_length(),
            "BLOCK_SCALES": problem.block_size > 0,
            "OPERAND_FACTOR": 1.0,
            "UNIT": 1.0,
            "DOT_OPTIONS": "",
            "WORDS": "",
            "SECOND_TABLE": 0,
            **self.parameters(problem),
        }
        settings = [f"{{%- set {name} = {value!r} %}}" for name, value in parameters.items()]
        parts = ("triton_unpack", "triton_tiles", self.body, "triton_store")
        return "\n".join((*settings, *map(text, parts)))


def _layout_reason(problem: GemmProblem, bits: tuple[int, ...]) -> str | None:
    if problem.device != "cuda":
        return f"the operand is on {problem.device}"
    if problem.format.bits not in bits:
        return f"{problem.weight_format} has {problem.format.bits} bits; it reads codes of {bits}"
    return None


def declines_architecture(problem: GemmProblem) -> str | None:
    """The reason of every family whose instructions begin with Ampere."""
    if capability(problem) >= FIRST_CAPABILITY or problem.architecture in AMD_TRIED:
        return None
    return f"{problem.architecture} was not tried, only sm_80 and later, {', '.join(AMD_TRIED)}"


def float_type(problem: GemmProblem) -> torch.dtype:
    """Of 16 bits, in which a float route multiplies; float32 operands come in parts of it."""
    return torch.float16 if problem.operand_dtype == torch.float16 else torch.bfloat16


def block_rows(problem: GemmProblem, rows: int) -> int:
    """Rows of a tile that holds all of a few: a power of two."""
    # AMD's smallest product has 16.
    smallest = 8 if capability(problem) else 16
    return max(smallest, 1 << (rows - 1).bit_length())


def splits(problem: GemmProblem, block_n: int, block_k: int) -> int:
    """In how many parts to divide K so that a grid of one row of tiles keeps the GPU busy.

    A part has two steps at least; Inductor unrolls the sum of 8 parts at most into its reader.
    Experts are busy enough, each with its rows.
    """
    if problem.experts:
        return 1
    programs = -(-problem.N // block_n)
    split = 1
    while split < 8 and programs * split < MULTIPROCESSORS and 4 * split * block_k <= problem.K:
        split *= 2
    return split


def capability(problem: GemmProblem) -> int:
    """As :func:`architecture_number`."""
    return architecture_number(problem.architecture)


def architecture_number(architecture: str) -> int:
    """NVIDIA's compute capability times ten; 0 for other vendors."""
    vendor, _, number = architecture.partition("_")
    return int(number) if vendor == "sm" else 0
