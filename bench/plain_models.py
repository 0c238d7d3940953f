"""Models in plain PyTorch, as people write them: no nn.Linear, shared or computed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

CHANNELS, HEADS, HIDDEN = 64, 4, 128


def _features(*names: str, same: bool = False) -> Callable[[int], dict[str, Tensor]]:
    def batch(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {name: torch.randn(4, 12, CHANNELS, generator=generator) for name in names}
        first = made[names[0]]
        return dict.fromkeys(names, first) if same else made

    return batch


class Functional(nn.Module):
    """Weights in a dict, products by einsum and matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(HIDDEN, CHANNELS) / 8)
                for name in ("up", "down", "gate")
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        gate = torch.sigmoid(x @ w["gate"].T)
        hidden = torch.einsum("btd,hd->bth", x, w["up"]) * gate
        return x + torch.einsum("bth,hd->btd", hidden, w["down"])


class Shared(nn.Module):
    """One layer called twice, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu(self.layer(x))))


class Parametrized(nn.Module):
    """A weight that is computed in every call, and a convolution's that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.position = parametrizations.weight_norm(nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1))
        self.first = parametrizations.weight_norm(nn.Linear(CHANNELS, HIDDEN))
        self.second = nn.Linear(HIDDEN, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x.mT).mT
        return self.second(torch.relu(self.first(x)))


class PatchEmbedding(nn.Module):
    """A vision transformer's stem in the style of timm, and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, CHANNELS, 4, stride=4)
        self.mix = nn.Conv1d(CHANNELS, CHANNELS, 1)
        self.local = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.proj(x).flatten(2))
        return self.head(F.gelu(self.local(x)).mean(dim=-1))


class Block(nn.Module):
    """A block in the style of timm: one projection taken apart by unbind, scaled residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.fc1, self.fc2 = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.rand(CHANNELS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, channels // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.gamma1 * self.proj(y)
        return x + self.gamma2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


def _images(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(4, 3, 18, 17, generator=generator)}


def _compiled() -> nn.Module:
    """Already under torch.compile; a backend that only traces keeps the table fast."""
    layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, HIDDEN, batch_first=True)
    model: nn.Module = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class PlainModel:
    """``build()`` it, ``batch(seed)`` a call, last names of the weights that are ``kept``."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    kept: tuple[str, ...] = ()


PLAIN: dict[str, PlainModel] = {
    "nn.TransformerEncoder": PlainModel(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(CHANNELS, HEADS, HIDDEN, batch_first=True), 2
        ),
        _features("src"),
    ),
    "nn.Transformer": PlainModel(
        lambda: nn.Transformer(CHANNELS, HEADS, 1, 1, HIDDEN, batch_first=True),
        _features("src", "tgt"),
    ),
    "nn.MultiheadAttention": PlainModel(
        lambda: nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True),
        _features("query", "key", "value", same=True),
    ),
    "weights without modules": PlainModel(Functional, _features("x")),
    "attention over other keys and values": PlainModel(
        lambda: nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True),
        _features("query", "key", "value"),
    ),
    "a layer called twice": PlainModel(Shared, _features("x")),
    "parametrized weights": PlainModel(Parametrized, _features("x"), ("weight",)),
    "a block as in timm": PlainModel(Block, _features("x")),
    "convolutions": PlainModel(PatchEmbedding, _images, ("weight",)),
    "under torch.compile": PlainModel(_compiled, _features("src")),
}
