"""``fp4::attend``: attention of the few query rows of a decode step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("fp4::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(query key^T * scale + mask) value``.

    torch's kernel for it is written for many queries and spends most of a decode step on
    preparing products of one row.

    Args:
        query: ``[B, H, R, D]``, float32, bfloat16 or float16.
        key, value: ``[B, H, L, D]``, of the same dtype.
        mask: floating ``[B, H, R, L]``, each of the first three sizes perhaps 1, or None.

    Returns:
        ``[B, H, R, D]`` in the dtype of ``query``; the sums are float32.
    """
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
