"""PyTorch's fused inference paths of attention and encoder layers, in operators that take quantized
weights. ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` take them under
``torch.compile``; eagerly they do not, for weights that are no plain tensors.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

# Kinds of mask: [L, L], [B, L] of padded keys, or [B, heads, L, L]; True, or -inf, is masked.
_MASK_VIEWS = {
    0: lambda mask: mask[None, None],
    1: lambda mask: mask[:, None, None],
    2: lambda mask: mask,
}


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``torch._native_multi_head_attention``: self-attention of ``query`` ``[B, L, embed_dim]``
    (which takes this path only where ``key`` and ``value`` are the same).
    """
    parts = F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts)
    scores = q @ k.transpose(-2, -1) / sqrt(embed_dim // num_heads)
    if mask is not None:
        view = _MASK_VIEWS[2 if mask_type is None else mask_type](mask)
        # A key's mask comes as numbers once it was merged with others.
        scores = scores.masked_fill(view, -torch.inf) if view.dtype == torch.bool else scores + view
    weights = scores.softmax(dim=-1)
    y = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return y, None
    return y, weights.mean(dim=1) if average_attn_weights else weights


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``."""

    def attend(x: Tensor) -> Tensor:
        projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        mask_options = {"mask": mask, "need_weights": False, "mask_type": mask_type}
        return native_attention(x, x, x, embed_dim, num_heads, *projections, **mask_options)[0]  # type: ignore[arg-type]  # of three kinds

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed_forward(second(x))
    x = first(src + attend(src))
    return second(x + feed_forward(x))
