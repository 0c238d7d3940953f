"""A key-value cache of transformers that holds codes: 4 to 8 bits where it had 16 or 32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer, get_layer_types_and_kwargs

from fp4compile import ops
from fp4compile.errors import SpecError
from fp4compile.formats import by_name, of_width

# By width; what each is worth beside the others: docs/kv-cache.md.
FORMATS = {4: "e2m1", 6: "e2m3", 8: "e3m4"}
# A channel of nothing but small keys in the prompt may see larger ones later, which the scale of
# its token has to cover: no channel is taken for smaller than this share of the head's largest.
SMALLEST_CHANNEL = 1 / 64

_ATTENTION = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "reference_sliding_attention"}
)


@dataclass(frozen=True)
class CacheFormats:
    """Format names of keys and values."""

    keys: str
    values: str


def channel_scale(keys: Tensor) -> Tensor:
    """float32 ``[B, H, 1, D]``: the largest magnitude of each channel in ``keys`` ``[B, H, L, D]``,
    relative to that of its head.
    """
    largest = keys.to(torch.float32).abs().amax(dim=-2, keepdim=True)
    relative = largest / largest.amax(dim=-1, keepdim=True).clamp(min=torch.finfo().tiny)
    return relative.clamp(min=SMALLEST_CHANNEL)


class _Codes:
    """What both kinds of layer hold: ``keys`` and ``values`` are codes, uint8 ``[B, H, L, bytes]``,
    with bfloat16 scales ``[B, H, L, 1]``; ``channel_scale`` is decided by the first keys.
    """

    formats: CacheFormats
    keys: Tensor | None
    values: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None
    channel_scale: Tensor | None
    dtype: torch.dtype
    channels: tuple[int, int]

    PER_TOKEN = ("keys", "key_scale", "values", "value_scale")

    def _encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """What is stored of new states, in the order of ``PER_TOKEN``."""
        if self.channel_scale is None:
            self.channel_scale = channel_scale(keys)
        self.dtype, self.channels = keys.dtype, (keys.shape[-1], values.shape[-1])
        return (
            *ops.quantize_states(keys, self.channel_scale, self.formats.keys),
            *ops.quantize_states(values, None, self.formats.values),
        )

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and values that are stored."""
        width, value_width = self.channels
        keys = ops.dequantize_states(
            self.keys, self.key_scale, self.channel_scale, self.formats.keys, width, self.dtype
        )
        values = ops.dequantize_states(
            self.values, self.value_scale, None, self.formats.values, value_width, self.dtype
        )
        return keys, values

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the layer keeps, all with the batch first."""
        names = (*self.PER_TOKEN, "channel_scale")
        return {name: held for name in names if (held := getattr(self, name)) is not None}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for name, held in self.tensors.items():
            setattr(self, name, held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name, held in self.tensors.items():
            setattr(self, name, held.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for name, held in self.tensors.items():
            setattr(self, name, held[indices])

    def offload(self) -> None:
        for name, held in self.tensors.items():
            setattr(self, name, held.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        for name, held in self.tensors.items():
            setattr(self, name, held.to(self.device, non_blocking=True))  # type: ignore[attr-defined]  # of transformers' layer


class QuantizedLayer(_Codes, DynamicLayer):
    """Codes that grow by every token."""

    def __init__(self, formats: CacheFormats) -> None:
        super().__init__()
        self.formats = formats
        self.key_scale = self.value_scale = self.channel_scale = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states ``[B, H, L, D]``; returns all that are stored, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = self._encoded(key_states, value_states)
        for name, part in zip(self.PER_TOKEN, new, strict=True):
            held = getattr(self, name)
            setattr(self, name, part if held is None else torch.cat([held, part], dim=-2))
        return self._decoded()

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    def reset(self) -> None:
        super().reset()
        self.key_scale = self.value_scale = self.channel_scale = None

    def crop(self, tokens_to_remove: int) -> None:
        keys_before = self.keys
        super().crop(tokens_to_remove)
        if self.keys is not keys_before:
            length = self.get_seq_length()
            for name in ("key_scale", "value_scale"):
                setattr(self, name, getattr(self, name)[..., :length, :])


class StaticQuantizedLayer(_Codes, StaticLayer):
    """Codes in memory for ``max_cache_len`` tokens, written in place."""

    cumulative_length: Tensor

    def __init__(self, formats: CacheFormats, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.formats = formats
        self.key_scale = self.value_scale = self.channel_scale = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states of these sizes; what they hold does not matter."""
        self.device = key_states.device
        self.batch_size = key_states.shape[0]
        self.cumulative_length = self.cumulative_length.to(self.device)
        like = (
            *ops.quantize_states(key_states, None, self.formats.keys),
            *ops.quantize_states(value_states, None, self.formats.values),
        )
        for name, part in zip(self.PER_TOKEN, like, strict=True):
            shape = (*part.shape[:-2], self.max_cache_len, part.shape[-1])
            setattr(self, name, part.new_zeros(shape))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write states ``[B, H, L, D]`` at the next positions; returns those of all
        ``max_cache_len`` positions, dequantized: zeros where nothing was written.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = self._encoded(key_states, value_states)
        length = key_states.shape[-2]
        positions = torch.arange(length, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(length)
        for name, part in zip(self.PER_TOKEN, new, strict=True):
            getattr(self, name).index_copy_(2, positions, part)
        return self._decoded()

    def reset(self) -> None:
        super().reset()
        self.channel_scale = None


class QuantizedCache(Cache):
    """Keys and values as FP4 (or FP6, FP8) codes, to be passed as ``past_key_values``.

    Every token of every head has a scale; keys also have one per channel, which the first call
    (the prompt) decides. What a query attends to is always what is stored, in the prompt as well.

    Args:
        config: the model's configuration.
        bits: 4, 6 or 8, where ``keys`` and ``values`` name no format.
        keys, values: formats (``"e2m1"``), which may differ.
        max_cache_len: tokens to allocate memory for; None: it grows.

    Raises:
        SpecError: no such width or format, or the model has layers that keep no keys and values.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        *,
        keys: str | None = None,
        values: str | None = None,
        max_cache_len: int | None = None,
    ) -> None:
        default = FORMATS.get(bits) or of_width(bits)[0].name
        formats = CacheFormats(by_name(keys or default).name, by_name(values or default).name)
        kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        others = sorted(set(kinds) - _ATTENTION)
        if others:
            raise SpecError(
                f"this model's cache has layers of type {', '.join(others)}, and only keys and "
                "values of attention can be codes; let generate choose the cache"
            )
        super().__init__(
            layers=[
                QuantizedLayer(formats)
                if max_cache_len is None
                else StaticQuantizedLayer(formats, max_cache_len)
                for _ in kinds
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in memory."""
        return sum(held.nbytes for layer in self.layers for held in layer.tensors.values())
