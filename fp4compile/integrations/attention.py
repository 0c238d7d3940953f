"""Products of attention in transformers' models, through its interface for attention functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fp4compile.attention_products import (
    AttentionCall,
    AttentionDecision,
    AttentionObserver,
    AttentionProducts,
    attention,
    search_attention,
)
from fp4compile.batches import Batch
from fp4compile.errors import SpecError, UnsupportedOperationError
from fp4compile.qparams import TensorSpec

NAME = "fp4compile"
_OBSERVED = "fp4compile_observed"
# Where a module of attention has its products.
ATTRIBUTE = "fp4_products"
# What some models hand to their attention and the function here does not compute.
_UNKNOWN = ("cache",)

_OnCall = Callable[..., None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    on_call: _OnCall | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers; rounds the operands where ``module`` has products.

    Raises:
        UnsupportedOperationError: the model's attention does more than this one.
    """
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise UnsupportedOperationError(
            f"the attention of {type(module).__name__} takes {', '.join(unknown)}, which has no "
            "quantized form; call quantize without attention"
        )
    call = AttentionCall(
        query,
        key,
        value,
        _sum(attention_mask, position_bias, key.shape[-2]),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap,
        s_aux,
    )
    output, probability = attention(call, getattr(module, ATTRIBUTE, None))
    if on_call is not None:
        on_call(module, call, probability, output)
    return output.transpose(1, 2).contiguous(), probability


def _sum(mask: Tensor | None, bias: Tensor | None, keys: int) -> Tensor | None:
    """What is added to the scores."""
    parts = [part[..., :keys] for part in (mask, bias) if part is not None]
    return sum(parts[1:], parts[0]) if parts else None


AttentionInterface.register(NAME, attend)
for _name in (NAME, _OBSERVED):
    AttentionMaskInterface.register(_name, eager_mask)


def decide_attention(
    model: PreTrainedModel, batches: Sequence[Batch], spec: TensorSpec, *, minmax: bool = False
) -> dict[str, AttentionDecision]:
    """Run ``batches`` in full precision and decide the products of every attention, by name.

    Raises:
        SpecError: the model's attention cannot be exchanged.
        UnsupportedOperationError: it does more than a product, a softmax and a product.
    """
    names = {module: name for name, module in model.named_modules()}
    observers: dict[str, AttentionObserver] = {}

    def on_call(module: nn.Module, *call: Any) -> None:
        observers.setdefault(names[module], AttentionObserver()).update(*call)

    with observed(model, on_call), torch.no_grad():
        for args, kwargs in batches:
            model(*args, **kwargs)
    if not observers:
        raise SpecError(
            f"no attention of {type(model).__name__} calls transformers' attention functions, so "
            "there are no products to quantize; call quantize without attention"
        )
    return {
        name: search_attention(observer.value, spec, minmax=minmax)
        for name, observer in observers.items()
    }


@contextmanager
def observed(model: PreTrainedModel, on_call: _OnCall) -> Iterator[None]:
    """Inside, ``on_call`` sees every call of an attention; the model is then as it was."""
    _check_exchangeable(model)
    before = model.config._attn_implementation
    AttentionInterface.register(_OBSERVED, partial(attend, on_call=on_call))
    try:
        model.set_attn_implementation(_OBSERVED)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_OBSERVED]


def _check_exchangeable(model: Any) -> None:
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise SpecError(
            f"the attention of {type(model).__name__} cannot be exchanged: products of attention "
            "are quantized in models of transformers that use its attention interface; call "
            "quantize without attention"
        )


def attach_products(model: PreTrainedModel, products: Mapping[str, AttentionProducts]) -> None:
    """Let the attentions called so compute with rounded operands."""
    if not products:
        return
    for name, made in products.items():
        setattr(model.get_submodule(name), ATTRIBUTE, made.to(model.device))
    model.set_attn_implementation(NAME)


def products_of(model: nn.Module) -> dict[str, AttentionProducts]:
    """The products in ``model`` by the name of their attention."""
    found = ((name, getattr(module, ATTRIBUTE, None)) for name, module in model.named_modules())
    return {name: made for name, made in found if isinstance(made, AttentionProducts)}
