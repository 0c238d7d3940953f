"""The ``torch.compile`` backend, and how a quantized model is compiled for forward and generate."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from fp4compile.program.dispatch import Dispatcher
from fp4compile.program.generate import GenerateWithStaticCache, takes_static_cache
from fp4compile.report import Report

logger = logging.getLogger(__name__)

# What goes to Dynamo becomes a graph per kind of call: batch of one or more, one token or many,
# empty or filled cache, with or without attention mask. Its default limit of 8 graphs is too few,
# and beyond it the rest would run uncompiled.
GRAPHS = 32


def fp4compile_backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fp4compile")``: Inductor with the fp4:: lowerings.

    ``mode`` and ``options`` are Inductor's. Registered under the entry-point group
    ``torch_dynamo_backends``, so the name works without importing fp4compile.
    """
    load_lowerings()
    inductor = torch._dynamo.lookup_backend("inductor")
    compiled: Callable[..., Any] = inductor(module, list(example_inputs), **options)
    return compiled


def load_lowerings() -> ModuleType:
    """Register the lowerings of the fp4:: ops with Inductor; returns their package."""
    # By name: fp4compile never imports lowering, which imports fp4compile.
    return importlib.import_module("fp4compile.lowering")


def compile_model(model: nn.Module) -> nn.Module:
    """Compile ``model``'s forward in place; batch and sequence stay dynamic.

    Calls run as programs (``program/dispatch.py``), those that no program can take under Dynamo.
    ``generate`` calls the forward, so it is compiled too, and uses a static cache where nobody asks
    for another; transformers' own compilation of the decode step is switched off, since it would
    compile the compiled forward again.
    """
    lowering = load_lowerings()
    report = getattr(model, "fp4_report", None)
    if isinstance(report, Report):
        kernels = {
            site.name: lowering.kernel_for(model.get_parameter(site.name), site.bias)
            for site in report.sites
            if site.bias is not None  # else the weight is only looked up
        }
        model.fp4_report = replace(report, kernels=kernels)  # type: ignore[assignment]
        counts = Counter(choice.target for choice in kernels.values())
        logger.info("kernels: %s", ", ".join(f"{n} x {target}" for target, n in counts.items()))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    model.compile(backend=fp4compile_backend, dynamic=True)
    dynamo = model._compiled_call_impl
    assert dynamo is not None
    model._compiled_call_impl = Dispatcher(
        model,
        lambda region, fake_mode: lowering.compile_graph(region.graph, fake_mode),
        dynamo,
    )
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.disable_compile = True
    if takes_static_cache(model) and "generate" not in vars(model):
        generate: Any = model.generate
        vars(model)["generate"] = GenerateWithStaticCache(model, generate)
    return model
