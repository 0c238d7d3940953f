"""What test files share: tiny models with random weights, and other libraries' formats."""

from __future__ import annotations

from typing import Any, ClassVar

import ml_dtypes
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 96

# Formats that another library defines too, with its dtype.
FOREIGN = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def tiny_llama(*, layers: int = 2, seed: int = 0, vocabulary: int = VOCABULARY) -> nn.Module:
    """A Llama with a tied head and grouped-query attention; activations differ between channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp2(torch.randn(parameter.shape) * 1.5))
    return model


def tiny_mixtral() -> nn.Module:
    """Experts that transformers stacks on loading and takes apart on saving."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=96,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).eval()


def byte_tokenizer() -> Any:
    """A token per byte, 257 with the end; its chat template is the first message."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *alphabet])}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def tokens(batch: int = 4, length: int = 24, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Token 0 is the padding.
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


class TinyLanguageModel(nn.Module):
    """A language model with the names of a Llama, and traced in no time; ``dummy_inputs`` as
    transformers' models have them.
    """

    dummy_inputs: ClassVar = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}

    def __init__(self, vocabulary: int = 257, channels: int = 32) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocabulary, channels)
        self.model.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.model.layers:
            layer.norm, layer.mlp = nn.LayerNorm(channels), nn.Module()
            layer.mlp.gate_proj = nn.Linear(channels, 48)
            layer.mlp.up_proj = nn.Linear(channels, 48)
            layer.mlp.down_proj = nn.Linear(48, channels)
        self.lm_head = nn.Linear(channels, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            y, mlp = layer.norm(x), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        return self.lm_head(x)


class NormThenLinears(nn.Module):
    """LayerNorm before two siblings, ReLU-free product before the last: everything folds."""

    def __init__(self, channels: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.gate = nn.Linear(channels, hidden)
        self.up = nn.Linear(channels, hidden)
        self.down = nn.Linear(hidden, channels, bias=False)
        nn.init.normal_(self.norm.weight, std=2.0)
        nn.init.normal_(self.norm.bias)
        with torch.no_grad():
            self.up.weight.mul_(torch.exp2(torch.randn(hidden, 1) * 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MatrixProducts(nn.Module):
    """Weights that are no nn.Linear: addmm and matmul in both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.kn = nn.Parameter(torch.randn(16, 24))
        self.bias = nn.Parameter(torch.randn(24))
        self.nk = nn.Parameter(torch.randn(12, 24))
        self.right = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.bias, x, self.kn)
        x = torch.matmul(torch.tanh(x), self.nk.t())
        return torch.sigmoid(x) @ self.right
