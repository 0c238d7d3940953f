"""The device's mathematical functions for the interpreter, which has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def _torch(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """``function`` of torch tensors for tensors of the interpreter."""

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        values = [torch.from_numpy(np.asarray(a.handle.data)) for a in arguments]
        result = function(*values).numpy()
        dtype = tl.int1 if result.dtype == bool else first.dtype
        kind = tl.block_type(dtype, first.shape) if first.type.is_block() else dtype
        return tl.tensor(TensorHandle(result, dtype), kind)

    return call


_NAMES: dict[str, Callable[..., torch.Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "copysign": torch.copysign,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "floor": torch.floor,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "log": torch.log,
    "log1p": torch.log1p,
    "log2": torch.log2,
    "nearbyint": torch.round,
    "pow": torch.pow,
    "rint": torch.round,
    "rsqrt": torch.rsqrt,
    "signbit": torch.signbit,
    "sin": torch.sin,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "trunc": torch.trunc,
}
LIBDEVICE = SimpleNamespace(**{name: _torch(function) for name, function in _NAMES.items()})
