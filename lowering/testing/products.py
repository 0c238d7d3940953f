"""Tensor cores for the interpreter: products of 16-, 8- and 4-bit floats and their block scales.

Triton's own interpreter multiplies the bits of bfloat16 and 8-bit floats as if they were integers,
does not round to 8-bit floats to nearest, and has no scaled product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fp4compile.formats import by_name

Numbers = NDArray[np.float32]

_BITS = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_E2M1 = np.array(by_name("e2m1").integer_values, np.float32) * by_name("e2m1").default_step
# Values that share an E4M3 scale, and an E8M0 scale (a byte).
_E4M3_BLOCK, _E8M0_BLOCK = 16, 32


def dot(_: Any, a: Any, b: Any, accumulator: Any, *__: Any) -> TensorHandle:
    exact = np.float64 if a.dtype.is_int() else np.float32
    product = _numbers(a).astype(exact) @ _numbers(b).astype(exact)
    result = product.astype(accumulator.data.dtype) + accumulator.data
    return TensorHandle(result, accumulator.dtype.scalar)


def dot_scaled(
    lhs: Any, lhs_scale: Any, lhs_format: str, rhs: Any, rhs_scale: Any, rhs_format: str, acc: Any
) -> Any:
    """``tl.dot_scaled`` for tensors of the interpreter; codes are packed along K."""
    left = _unpacked(lhs.handle, lhs_format) * _spread(lhs_scale.handle)
    transposed = TensorHandle(rhs.handle.data.T, rhs.handle.dtype)
    right = _unpacked(transposed, rhs_format) * _spread(rhs_scale.handle)
    return tl.tensor(TensorHandle(left @ right.T + acc.handle.data, acc.dtype), acc.type)


def _unpacked(x: TensorHandle, format: str) -> Numbers:
    """``[rows, K]``; two codes per byte of E2M1, the low nibble first."""
    if format != "e2m1":
        return _numbers(x)
    return np.stack((_E2M1[x.data & 15], _E2M1[x.data >> 4]), axis=-1).reshape(len(x.data), -1)


def _spread(scale: TensorHandle) -> Numbers:
    """One scale per value."""
    if scale.dtype.scalar == tl.float8e4nv:
        return np.repeat(_numbers(scale), _E4M3_BLOCK, axis=-1)
    powers = np.ldexp(np.float32(1), scale.data.astype(np.int32) - 127)
    return np.repeat(powers, _E8M0_BLOCK, axis=-1)


def _numbers(x: TensorHandle) -> NDArray[Any]:
    dtype = _BITS.get(x.dtype.scalar)
    if dtype is None:
        return x.data
    return torch.from_numpy(np.ascontiguousarray(x.data)).view(dtype).float().numpy()


_convert = InterpreterBuilder.create_fp_to_fp


def fp_to_fp(builder: Any, source: Any, dtype: Any, rounding: Any) -> TensorHandle:
    kinds = (source.dtype.scalar, dtype.scalar)
    if not any(kind.is_fp8() for kind in kinds):
        return _convert(builder, source, dtype, rounding)
    values = torch.from_numpy(np.ascontiguousarray(_numbers(source), np.float32))
    if not dtype.scalar.is_fp8():
        return _convert(builder, TensorHandle(values.numpy(), tl.float32), dtype, rounding)
    bits = values.to(_BITS[dtype.scalar]).view(torch.uint8)
    return TensorHandle(bits.numpy(), dtype.scalar)


# By the names that Triton's builder has for them.
PRODUCTS: dict[str, Callable[..., TensorHandle]] = {
    "create_dot": dot,
    "create_fp_to_fp": fp_to_fp,
}
