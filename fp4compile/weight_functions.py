"""What torch functions compute when their weight is quantized.

They take an ``FP4Tensor`` where torch's have a weight; called with anything else in its place, or
with a quantized tensor in another's, they raise ``UnsupportedOperationError``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4compile.errors import UnsupportedOperationError
from fp4compile.fused_attention import encoder_layer, native_attention
from fp4compile.weight_uses import (
    CONVOLUTIONS,
    convolution_reason,
    einsum_transposed,
    is_grouped,
    patches,
)

aten = torch.ops.aten


class PackedWeight(torch.Tensor):
    """What the functions here take in place of a weight; ``FP4Tensor`` is the one there is.

    Abstract, without saying so: a tensor's metaclass does not mix with that of ``abc``.
    """

    transposed: bool
    patch: tuple[int, ...]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias``."""
        raise NotImplementedError

    def grouped_linear(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows of ``x`` up to ``offsets[e]`` times ``W[e]^T``."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Rows of the weight."""
        raise NotImplementedError


def _linear(input: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedWeight) or weight.transposed or weight.dim() != 2:
        raise UnsupportedOperationError(
            "F.linear needs the quantized tensor as its weight [N, K], not as its input or "
            "transposed; leave this parameter out with ignore=[...]"
        )
    return weight.linear(input, bias)


def _matmul(input: Tensor, other: PackedWeight) -> Tensor:
    if not isinstance(other, PackedWeight) or not other.transposed or other.dim() != 2:
        raise UnsupportedOperationError(
            "matmul needs the quantized tensor as its right operand [K, N]; "
            "leave this parameter out with ignore=[...]"
        )
    return other.linear(input, None)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: PackedWeight, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta != 1 or alpha != 1 or not isinstance(mat2, PackedWeight) or not mat2.transposed:
        raise UnsupportedOperationError(
            f"addmm on a quantized weight needs it as mat2 [K, N] and beta = alpha = 1, "
            f"got beta={beta}, alpha={alpha}; leave this parameter out with ignore=[...]"
        )
    return mat2.linear(mat1, input)


def _embedding(
    input: Tensor,
    weight: PackedWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *_unused: Any,
    **_also_unused: Any,
) -> Tensor:
    if max_norm is not None:
        raise UnsupportedOperationError(
            "an embedding with max_norm rescales its weight in place and cannot be quantized; "
            "leave it out with ignore=[...]"
        )
    return weight.lookup(input)


def _convolution(
    input: Tensor, weight: PackedWeight, bias: Tensor | None = None, *options: Any, **named: Any
) -> Tensor:
    reason = convolution_reason(weight.patch, *options, **named)
    if not weight.patch or reason is not None:
        raise UnsupportedOperationError(
            f"a convolution on a quantized weight of shape {tuple(weight.shape)} must tile its "
            f"input: {reason or 'the weight is no convolution'}; leave this parameter out with "
            "ignore=[...]"
        )
    x = input if input.dim() == weight.dim() else input.unsqueeze(0)
    y = weight.linear(patches(x, weight.patch), bias).movedim(-1, 1)
    return y if x is input else y.squeeze(0)


def _grouped(
    input: Tensor, weight: PackedWeight, offs: Tensor | None = None, **named: Any
) -> Tensor:
    if (
        offs is None
        or not isinstance(weight, PackedWeight)
        or not weight.transposed
        or weight.dim() != 3
        or any(value is not None for value in named.values())
    ):
        raise UnsupportedOperationError(
            "grouped_mm needs the quantized tensor as its experts' weights [E, K, N] and offs; "
            "leave this parameter out with ignore=[...]"
        )
    return weight.grouped_linear(input, offs)


def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """One row per matrix, as experts chosen by indexing are called: ``[S, 1, K] x [S, K, N]``, or
    ``[S, N, K] x [S, K, 1]``.
    """
    if (
        isinstance(mat2, PackedWeight)
        and mat2.transposed
        and input.dim() == 3
        and input.shape[1] == 1
    ):
        return _row_each(input.squeeze(1), mat2).unsqueeze(1)
    if isinstance(input, PackedWeight) and not input.transposed and mat2.shape[-1] == 1:
        return _row_each(mat2.squeeze(-1), input).unsqueeze(-1)
    raise UnsupportedOperationError(
        "bmm takes a quantized stack of matrices only with one row for each; leave this "
        "parameter out with ignore=[...]"
    )


def _einsum(equation: str, *operands: Any, **_unused: Any) -> Tensor:
    x, weight = operands[0] if len(operands) == 1 else operands
    if not isinstance(weight, PackedWeight) or einsum_transposed(equation) is not weight.transposed:
        raise UnsupportedOperationError(
            f"einsum {equation!r} is no product of [..., K] with the quantized tensor of shape "
            f"{tuple(weight.shape)}; leave this parameter out with ignore=[...]"
        )
    return weight.linear(x, None)


def _row_each(x: Tensor, weight: PackedWeight) -> Tensor:
    return weight.grouped_linear(x, torch.arange(1, x.shape[0] + 1, device=x.device))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """F.multi_head_attention_forward. Its F.linear would expand the weight for an input that is
    not contiguous, as it is with ``batch_first``.
    """
    # It looks at identities to see that this is self-attention.
    made = {id(x): x.contiguous() for x in (query, key, value)}
    with torch._C.DisableTorchFunctionSubclass():
        result: Any = F.multi_head_attention_forward(
            made[id(query)], made[id(key)], made[id(value)], *args, **kwargs
        )
    return result


# Ops that may do no more to a weight than swap its last two dimensions.
TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    F.conv3d: _convolution,
    F.grouped_mm: _grouped,
    F.multi_head_attention_forward: _attention,
    torch._native_multi_head_attention: native_attention,
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.bmm: _bmm,
    torch.einsum: _einsum,
    torch.Tensor.bmm: _bmm,
}
_OPERATORS: dict[Any, Callable[..., Tensor]] = {
    aten.linear.default: _linear,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.einsum.default: _einsum,
    aten.embedding.default: lambda weight, indices, *_rest: weight.lookup(indices),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}


def by_operator(func: Any) -> Callable[..., Tensor] | None:
    """What serves an ``aten`` or library operator (or its packet) on a quantized weight."""
    overload = func.default if isinstance(func, torch._ops.OpOverloadPacket) else func
    if is_grouped(overload):
        return _grouped
    return _OPERATORS.get(overload)
