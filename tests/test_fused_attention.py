"""PyTorch's fused paths, which compiled models take, agree with the operators of the eager path."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.fused_attention import encoder_layer, native_attention

PADDING = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
def test_the_encoder_layer_is_torchs(norm_first, activation, padded, monkeypatch):
    torch.manual_seed(0)
    options = {"norm_first": norm_first, "activation": activation, "batch_first": True}
    layer = nn.TransformerEncoderLayer(16, 4, 24, **options).eval()
    x = torch.randn(2, 7, 16)
    masks = {"src_key_padding_mask": PADDING} if padded else {}
    called = []

    def replaced(*args, **kwargs):
        called.append(args)
        return encoder_layer(*args, **kwargs)

    with torch.no_grad():
        expected = layer(x, **masks)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", replaced)
        got = layer(x, **masks)
    assert called
    keep = ~PADDING if padded else torch.ones_like(PADDING)
    torch.testing.assert_close(got[keep], expected[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masks", [{}, {"key_padding_mask": PADDING}], ids=["all", "padded"])
def test_the_attention_is_torchs(average, masks, monkeypatch):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 7, 16)
    called = []

    def replaced(*args, **kwargs):
        called.append(args)
        return native_attention(*args, **kwargs)

    with torch.no_grad():
        expected = attention(x, x, x, average_attn_weights=average, **masks)
        monkeypatch.setattr(torch, "_native_multi_head_attention", replaced)
        got = attention(x, x, x, average_attn_weights=average, **masks)
    assert called
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_a_quantized_layer_is_the_same_under_torch_compile(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 16)
    if kind == "layer":
        model, call = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval(), (x,)
    else:
        model, call = nn.MultiheadAttention(16, 4, batch_first=True).eval(), (x, x, x)
    fp4compile.quantize(model, [call], "w8a8", method="minmax", progress=False)
    with torch.no_grad():
        eager = model(*call)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*call)
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)
