"""The ``torch.compile`` backend, and how a quantized model is compiled for forward and generate."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from fp4compile.channel_order import order_channels
from fp4compile.coverage import attributed, recorded
from fp4compile.program.dispatch import Dispatcher
from fp4compile.program.generate import leave_generate, use_static_cache
from fp4compile.program.program import CompiledRegion
from fp4compile.program.regions import Region
from fp4compile.quantize_graph import quantize_graph
from fp4compile.report import Report
from fp4compile.siblings import merge_siblings
from fp4compile.tensor import FP4Tensor

logger = logging.getLogger(__name__)

# torch.compile makes a graph per kind of call: batch of one or more, one token or many, empty or
# filled cache, with or without attention mask. Dynamo's default limit of 8 graphs is too few, and
# beyond it the rest would run uncompiled.
GRAPHS = 32


def fp4compile_backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fp4compile")``: Inductor with the fp4:: lowerings.

    Registered under the entry-point group ``torch_dynamo_backends``, so the name works without
    importing fp4compile.

    Args:
        mode: Inductor's.
        options: Inductor's, and ``"recipe"``: a :class:`Recipe` or a path to one, by which the
            weights of a full-precision model are quantized as it is compiled. They are read once,
            like constants.

    Raises:
        RecipeError: the recipe cannot be read, or belongs to another model.
    """
    options = dict(options or {})
    recipe = options.pop("recipe", None)
    if recipe is not None:
        module = quantize_graph(module, example_inputs, recipe)
    weights = [value for value in example_inputs if isinstance(value, FP4Tensor)]
    if any(weight.device.type == "cuda" for weight in weights):
        module = merge_siblings(module, example_inputs)
    compiled: Callable[..., Any] = load_lowerings().compile_graph(
        module, list(example_inputs), mode, options
    )
    return compiled


def load_lowerings() -> ModuleType:
    """Register the lowerings of the fp4:: ops with Inductor; returns their package."""
    # By name: fp4compile never imports lowering, which imports fp4compile.
    return importlib.import_module("fp4compile.lowering")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(model)`` returned; other models as they are."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        load_lowerings()  # it compiles again once its weights are quantized
        return uncompiled(model._orig_mod)
    return model


def compile_model(model: nn.Module, *, programs: bool = True) -> nn.Module:
    """Compile ``model``'s forward in place; batch and sequence stay dynamic.

    ``generate`` calls the forward, so it is compiled too; transformers' own compilation of the
    decode step is switched off, since it would compile the compiled forward again. What
    ``torch.compile`` returned stays as it is. On a GPU that multiplies 4-bit floats the channels of
    weights are sorted by their exponent shifts (``order_channels``).

    Args:
        programs: on a CPU, run calls as programs (docs/cpu.md): repeated blocks compile once, no
            guards run between the steps of ``generate``, and it uses a static cache where nobody
            asks for another. Calls that no program can take are compiled by Dynamo, as all are
            with False; a warning of the logger ``fp4compile`` has the reason.
    """
    lowering = load_lowerings()
    wrapper, model = model, uncompiled(model)
    if any(lowering.multiplies_fp4(name) for name in _architectures(model, lowering)):
        order_channels(model)
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
    if wrapper is model:
        _compile(model, lowering, programs=programs)
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        generation_config.disable_compile = True
    return wrapper


def _architectures(model: nn.Module, lowering: ModuleType) -> set[str]:
    """Of the GPUs that hold FP4 weights of ``model``."""
    weights = (weight for weight in model.parameters() if isinstance(weight, FP4Tensor))
    devices = {weight.device for weight in weights if weight.device.type == "cuda"}
    return {lowering.architecture(device) for device in devices}


def _compile(model: nn.Module, lowering: ModuleType, *, programs: bool) -> None:
    model.compile(backend=recorded(model, fp4compile_backend, lowering), dynamic=True)
    leave_generate(model)
    elsewhere = {tensor.device.type for tensor in model.parameters()} - {"cpu"}
    if not programs or elsewhere:
        logger.info("calls are compiled by Dynamo: %s", elsewhere or "programs=False")
        return
    dynamo = model._compiled_call_impl
    assert dynamo is not None
    compile_region = partial(_compile_region, lowering)
    model._compiled_call_impl = Dispatcher(model, compile_region, dynamo, lowering.Recording)
    use_static_cache(model)


def _compile_region(lowering: Any, region: Region, fake_mode: Any) -> CompiledRegion:
    codes: list[str] = []
    with lowering.saved_code(codes.append):
        run = lowering.compile_region(region.graph, fake_mode)
    calls = [call for code in codes for call in attributed(lowering, code, len(region.inputs))]
    return CompiledRegion(run, tuple(calls))
