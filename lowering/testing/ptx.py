"""Inline assembly for the interpreter: the few PTX instructions of ``unpack.py``, on arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import TensorHandle

Words = NDArray[np.uint32]


def _prmt(a: Words, b: Words, selectors: Words) -> Words:
    """PTX ISA, prmt in its default mode: every byte by a nibble of ``selectors``."""
    joined = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selectors.shape), np.uint32)
    for i in range(4):
        selector = selectors >> np.uint32(4 * i)
        byte = (joined >> (8 * (selector & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte >= 128, np.uint32(255), np.uint32(0))
        result |= np.where(selector & 8, sign, byte) << np.uint32(8 * i)
    return result


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if int(table) >> row & 1:
            bits = [x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result |= bits[0] & bits[1] & bits[2]
    return result


def _dp4a(a: Words, b: Words, c: Words) -> Words:
    products = a.view(np.int8).astype(np.int32) * b.view(np.int8)
    total: Words = (products.reshape(-1, 4).sum(axis=1, dtype=np.int32)).view(np.uint32) + c
    return total


def _fma(dtype: torch.dtype) -> Callable[..., Words]:
    """Twice a 16-bit float in each word, rounded once."""

    def fma(a: Words, b: Words, c: Words) -> Words:
        x, y, z = (
            torch.from_numpy(_halves(word, a.shape)).view(dtype).double() for word in (a, b, c)
        )
        return (x * y + z).to(dtype).view(torch.int16).numpy().view(np.uint32).reshape(a.shape)

    return fma


def _halves(word: Words, shape: Any) -> NDArray[np.int16]:
    return np.ascontiguousarray(np.broadcast_to(word, shape)).view(np.int16)


_INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": np.copy,
    "mov.u32": np.copy,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "dp4a.s32.s32": _dp4a,
    "fma.rn.bf16x2": _fma(torch.bfloat16),
    "fma.rn.f16x2": _fma(torch.float16),
}


def emulate(assembly: str, outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """Registers ``$0`` to ``$outputs-1`` after ``assembly`` ran on ``inputs``, the next registers.

    Element i is in lane i mod 32.

    Raises:
        NotImplementedError: an instruction that is not in the table.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    lanes = np.arange(inputs[0].size, dtype=np.uint32).reshape(inputs[0].shape) % np.uint32(32)
    registers["%lanemask_lt"] = (np.uint32(1) << lanes) - np.uint32(1)
    for line in assembly.strip("{} \n").split(";"):
        name, *operands = re.split(r"[\s,]+", line.strip())
        if name in ("", ".reg"):
            continue
        if name not in _INSTRUCTIONS:
            raise NotImplementedError(f"the emulator has no {name}; it has {list(_INSTRUCTIONS)}")
        destination, *sources = operands
        values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
        registers[destination] = _INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """Triton's function of that name, for tensors of the interpreter."""
    outputs = constraints.count("=")
    shape = args[0].shape
    words = [word for arg in args for word in _words(arg.handle.data, shape, pack)]
    data = np.stack(emulate(asm, outputs, words), axis=-1).view(_STORED[dtype])
    sizes = [int(size) for size in shape]
    return tl.tensor(TensorHandle(data.reshape(sizes), dtype), tl.block_type(dtype, sizes))


_STORED = {tl.int16: np.int16, tl.int32: np.int32}


def _words(data: NDArray[Any], shape: Any, pack: int) -> list[Words]:
    """The registers of an argument: one of ``pack`` bytes, or ``pack`` of a word each."""
    data = np.broadcast_to(data, [int(size) for size in shape])
    packed = np.ascontiguousarray(data).reshape(-1, pack).view(np.uint32)
    return list(packed.T)
