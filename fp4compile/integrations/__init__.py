"""Other libraries' ways to quantized models; each is loaded when its library is."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from wrapt import when_imported

from fp4compile.attention_products import AttentionDecision, AttentionProducts
from fp4compile.batches import Batch
from fp4compile.compile import load_lowerings
from fp4compile.errors import CompileError, MissingDependencyError, SpecError
from fp4compile.qparams import QuantSpec, TensorSpec

logger = logging.getLogger(__name__)


def install_hooks() -> None:
    """Make Inductor and transformers know FP4 weights as soon as they are imported.

    Importing either takes seconds, so ``import fp4compile`` does not.
    """
    # compile_fx is the last module that Inductor imports; the lowerings need all others.
    when_imported("torch._inductor.compile_fx")(lambda _: _register_lowerings())
    # All that loads a model imports it, and it imports the registry of quantizers.
    when_imported("transformers.modeling_utils")(
        lambda _: importlib.import_module("fp4compile.integrations.hf_quantizer")
    )


# Name in fp4compile -> the module that has it, and the extra whose library it imports.
LAZY = {
    "FP4Config": ("fp4compile.integrations.torchao_config", "torchao"),
    "FP4Quantizer": ("fp4compile.integrations.pt2e", "torchao"),
    "QuantizedCache": ("fp4compile.integrations.cache", "hf"),
}


def lazy_attribute(name: str) -> Any:
    """What ``fp4compile.<name>`` is, where another library must be imported to have it.

    Raises:
        MissingDependencyError: that library is not installed.
    """
    if name not in LAZY:
        raise AttributeError(f"module 'fp4compile' has no attribute {name!r}")
    module, extra = LAZY[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingDependencyError(
            f"fp4compile.{name} needs {extra}: pip install 'fp4compile[{extra}]' ({error})"
        ) from error


def attach(model: nn.Module) -> None:
    """Make a quantized model known to the library that it is from, so that it can be saved."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        importlib.import_module("fp4compile.integrations.hf_quantizer").attach(model)


def decide_products(
    model: nn.Module,
    batches: Sequence[Batch],
    spec: QuantSpec,
    method: str,
    asked: bool | TensorSpec,
    *,
    from_recipe: bool,
) -> dict[str, AttentionDecision]:
    """What ``quantize(attention=asked)`` decides; nothing where nothing is asked.

    Raises:
        SpecError: no bits are known for them, or a recipe is given, which has none.
    """
    if asked is False:
        return {}
    if from_recipe:
        raise SpecError(
            "a recipe has no products of attention; leave attention out, or give calibration data "
            "instead of the recipe"
        )
    if asked is True and spec.activation is None:
        raise SpecError(
            "this spec has no bits for activations, so none for attention; give "
            "attention=TensorSpec(bits, granularity='tensor')"
        )
    found = spec.activation if asked is True else asked
    assert isinstance(found, TensorSpec)
    return decide_attention(model, batches, found, minmax=method == "minmax")


def decide_attention(
    model: nn.Module, batches: Sequence[Batch], spec: TensorSpec, *, minmax: bool
) -> dict[str, AttentionDecision]:
    """The products of every attention of a model of transformers, see ``attention.py``.

    Raises:
        SpecError: it is no such model, or its attention cannot be exchanged.
    """
    if "transformers.modeling_utils" not in sys.modules:
        raise SpecError(
            f"products of attention are quantized in models of transformers, not in a "
            f"{type(model).__name__}; call quantize without attention"
        )
    module = importlib.import_module("fp4compile.integrations.attention")
    found: dict[str, AttentionDecision] = module.decide_attention(
        model, batches, spec, minmax=minmax
    )
    return found


def attach_attention(model: nn.Module, decisions: Mapping[str, AttentionDecision]) -> None:
    """Let the decided attentions compute with rounded operands."""
    if decisions:
        module = importlib.import_module("fp4compile.integrations.attention")
        products = {name: AttentionProducts(made.operands) for name, made in decisions.items()}
        module.attach_products(model, products)


def _register_lowerings() -> None:
    try:
        load_lowerings()
    except CompileError as error:
        # Somebody's own model is being compiled, perhaps; quantized ones run on the eager ops.
        logger.warning("the lowerings of FP4 weights are not available: %s", error)
