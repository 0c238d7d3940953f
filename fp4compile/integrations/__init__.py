"""Other libraries' ways to quantized models; each is loaded when its library is."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

from torch import nn
from wrapt import when_imported

from fp4compile.compile import load_lowerings
from fp4compile.errors import CompileError, MissingDependencyError

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


# Name in fp4compile -> the module that has it, which imports torchao.
TORCHAO = {
    "FP4Config": "fp4compile.integrations.torchao_config",
    "FP4Quantizer": "fp4compile.integrations.pt2e",
}


def lazy_attribute(name: str) -> Any:
    """What ``fp4compile.<name>`` is, where another library must be imported to have it.

    Raises:
        MissingDependencyError: that library is not installed.
    """
    if name not in TORCHAO:
        raise AttributeError(f"module 'fp4compile' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(TORCHAO[name]), name)
    except ImportError as error:
        raise MissingDependencyError(
            f"fp4compile.{name} needs torchao: pip install 'fp4compile[torchao]' ({error})"
        ) from error


def attach(model: nn.Module) -> None:
    """Make a quantized model known to the library that it is from, so that it can be saved."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        importlib.import_module("fp4compile.integrations.hf_quantizer").attach(model)


def _register_lowerings() -> None:
    try:
        load_lowerings()
    except CompileError as error:
        # Somebody's own model is being compiled, perhaps; quantized ones run on the eager ops.
        logger.warning("the lowerings of FP4 weights are not available: %s", error)
