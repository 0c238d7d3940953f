"""``fp4::attend``: attention, of the few query rows of a decode step or of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("fp4::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool = False,
    rows_first: bool = False,
) -> Tensor:
    """``softmax(query key^T * scale + mask) value``.

    torch's kernel for it spends most of a decode step on preparing products of one row, and
    computes what the mask of a prompt hides.

    Args:
        query: ``[B, H, R, D]``, float32, bfloat16 or float16.
        key, value: ``[B, H, L, D]``, of the same dtype.
        mask: floating ``[B, H, R, L]``, each of the first three sizes perhaps 1, or None.
        causal: query row ``r`` sees keys ``0..r``; not beside a mask.
        rows_first: the result lies in memory as ``[B, R, H, D]``.

    Returns:
        ``[B, H, R, D]`` in the dtype of ``query``; the sums are float32.
    """
    result = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    if rows_first:
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    return result.contiguous()


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool = False,
    rows_first: bool = False,
) -> Tensor:
    batch, heads, rows, head = query.shape
    if not rows_first:
        return query.new_empty(batch, heads, rows, head)
    return query.new_empty(batch, rows, heads, head).transpose(1, 2)
