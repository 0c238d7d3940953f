"""What a GEMM's kernel reads ready-made, as pointwise IR that fuses with what comes before: the
operand in another type, the weight decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.virtualized import ops
from torch.utils._sympy.functions import FloorDiv

from fp4compile.blocks import SECOND_FORMAT
from fp4compile.formats import FloatFormat
from fp4compile.lowering.inductor import contiguous
from fp4compile.lowering.problem import GemmProblem

FLOAT32_BIAS = 127


def converted_operand(
    problem: GemmProblem, inputs: dict[str, Any], dtype: torch.dtype, factor: float
) -> Any:
    """The operand ``[M, K]`` times ``factor`` in ``dtype``, realized.

    With block scales each value is multiplied by its own; by its quotient with ``operand_outer``,
    an E4M3 number, where that is among the ``inputs``.
    """
    load = inputs["operand"].make_loader()
    blocks = problem.operand_scale == "block"
    load_scale = inputs["operand_scale"].make_loader() if blocks else None
    load_outer = inputs["operand_outer"].make_loader() if "operand_outer" in inputs else None

    def value(index: Any) -> Any:
        x = ops.to_dtype(load(index), torch.float32)
        if factor != 1.0:
            x = ops.mul(x, ops.constant(factor, torch.float32))
        if load_scale is not None:
            m, k = index
            scale = load_scale([m * problem.blocks + FloorDiv(k, problem.block_size)])
            if load_outer is not None:
                scale = _nearest_e4m3(ops.truediv(scale, load_outer([0])))
            x = ops.mul(x, scale)
        return ops.to_dtype(x, dtype)

    return _realized(inputs["operand"], dtype, inputs["operand"].get_size(), value)


def decoded_weight(problem: GemmProblem, packed: Any, block_scale: Any, dtype: torch.dtype) -> Any:
    """Values ``[N, K]`` of the codes of 4 bits in ``packed``, times their blocks' E4M3 scales."""
    load = packed.make_loader()
    load_scale = None if block_scale is None else block_scale.make_loader()

    def value(index: Any) -> Any:
        n, k = index
        byte = ops.to_dtype(load([n, FloorDiv(k, 2)]), torch.int32)
        odd = ops.bitwise_and(ops.index_expr(k, torch.int32), _integer(1))
        code = ops.bitwise_right_shift(byte, ops.mul(odd, _integer(4)))
        first, *second = (_value(code, fmt) for fmt in problem.formats)
        if load_scale is None:
            return ops.to_dtype(first, dtype)
        scale = ops.to_dtype(load_scale([n, FloorDiv(k, problem.block_size)]), torch.int32)
        if second:
            first = ops.where(ops.ge(scale, _integer(SECOND_FORMAT)), second[0], first)
        scale = _e4m3(ops.bitwise_and(scale, _integer(SECOND_FORMAT - 1)))
        return ops.to_dtype(ops.mul(first, scale), dtype)

    return _realized(packed, dtype, [packed.get_size()[0], problem.K], value)


def _value(code: Any, fmt: FloatFormat) -> Any:
    """float32 integer value of the code in the lower four bits."""
    magnitude = ops.bitwise_and(code, _integer(7))
    x = _unsigned_float(magnitude, fmt.mantissa_bits)
    return ops.where(ops.ne(ops.bitwise_and(code, _integer(8)), _integer(0)), ops.neg(x), x)


def _nearest_e4m3(x: Any) -> Any:
    """``x``, a rounding of float32 away from an E4M3 number of any exponent, as that number."""
    bits = ops.to_dtype_bitcast(x, torch.int32, torch.float32)
    rounded = ops.bitwise_and(ops.add(bits, _integer(1 << 19)), _integer(-1 << 20))
    return ops.to_dtype_bitcast(rounded, torch.float32, torch.int32)


def _e4m3(code: Any) -> Any:
    """float32 of an E4M3 number without sign, from its code."""
    return ops.mul(_unsigned_float(code, 3), ops.constant(2.0**-9, torch.float32))


def _unsigned_float(code: Any, mantissa_bits: int) -> Any:
    """(2^m + mantissa) 2^(exponent - 1) from the bits of both; without exponent the mantissa."""
    raised = ops.add(code, _integer((FLOAT32_BIAS - 1 + mantissa_bits) << mantissa_bits))
    bits = ops.bitwise_left_shift(raised, _integer(23 - mantissa_bits))
    normal = ops.to_dtype_bitcast(bits, torch.float32, torch.int32)
    small = ops.lt(code, _integer(1 << mantissa_bits))
    return ops.where(small, ops.to_dtype(code, torch.float32), normal)


def _integer(value: int) -> Any:
    return ops.constant(value, torch.int32)


def _realized(like: Any, dtype: torch.dtype, size: Any, value: Any) -> Any:
    node = ir.Pointwise.create(
        device=like.get_device(), dtype=dtype, inner_fn=value, ranges=list(size)
    )
    return contiguous(node)
