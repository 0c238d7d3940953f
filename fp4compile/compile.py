"""The ``torch.compile`` backend, and how a quantized model is compiled for forward and generate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn


def fp4compile_backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fp4compile")``: Inductor with the fp4:: lowerings.

    ``mode`` and ``options`` are Inductor's. Registered under the entry-point group
    ``torch_dynamo_backends``, so the name works without importing fp4compile.
    """
    load_lowerings()
    inductor = torch._dynamo.lookup_backend("inductor")
    compiled: Callable[..., Any] = inductor(module, example_inputs, **options)
    return compiled


def load_lowerings() -> None:
    """Register the lowerings of the fp4:: ops with Inductor."""
    # By name: fp4compile never imports lowering, which imports fp4compile.
    importlib.import_module("fp4compile.lowering")


def compile_model(model: nn.Module) -> nn.Module:
    """Compile ``model``'s forward in place; batch and sequence stay dynamic.

    ``generate`` calls the forward, so it is compiled too; transformers' own compilation of the
    decode step is switched off, since it would compile the compiled forward again.
    """
    load_lowerings()
    model.compile(backend=fp4compile_backend, dynamic=True)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.disable_compile = True
    return model
