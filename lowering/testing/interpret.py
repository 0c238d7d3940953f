"""``interpret``: the module that a GPU would run, run by Triton's interpreter on CPU tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton.language as tl
from torch import fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction

from fp4compile.lowering.gpus import Gpu
from fp4compile.lowering.testing.device import fake_gpu
from fp4compile.lowering.testing.generate import compiled_on_gpu, run
from fp4compile.lowering.testing.libdevice import LIBDEVICE
from fp4compile.lowering.testing.products import PRODUCTS, dot_scaled
from fp4compile.lowering.testing.ptx import inline_asm_elementwise
from fp4compile.siblings import merge_siblings

# Modules of functions that kernels call; compiled when they were imported.
_LIBRARIES: tuple[ModuleType, ...] = (tl, tl.standard, triton_helpers)
# What the interpreter replaces in them, not always restoring it.
_PATCHED: tuple[Any, ...] = (
    tl,
    tl.core,
    tl.math,
    tl.standard,
    tl.tensor,
    tl.core.tensor_descriptor_base,
    tl.dtype,
    triton_helpers,
)


def interpret(
    function: Callable[..., Any], inputs: Sequence[Any], gpu: Gpu, *, dynamic: bool | None = None
) -> Any:
    """``function(*inputs)`` computed on the CPU by the code that ``gpu`` would run.

    Every kernel runs in the first of its configurations. Arguments as of ``compile_for``.
    """
    return interpret_with_sources(function, inputs, gpu, dynamic=dynamic)[0]


def interpret_with_sources(
    function: Callable[..., Any], inputs: Sequence[Any], gpu: Gpu, *, dynamic: bool | None = None
) -> tuple[Any, list[str]]:
    """As :func:`interpret`, with the module that ran for each graph."""
    sources: list[str] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = merge_siblings(graph, inputs)
        with fake_gpu(gpu), interpreter(), _calls_interpreted(gpu, sources):
            return compiled_on_gpu(graph)

    return run(function, inputs, backend, dynamic), sources


@contextlib.contextmanager
def _calls_interpreted(gpu: Gpu, sources: list[str]) -> Iterator[None]:
    """The modules that Inductor loads meanwhile are replaced by ones that run on CPU tensors."""
    load = GraphLowering.compile_to_module

    def load_interpreted(graph: GraphLowering) -> Any:
        load(graph)
        return SimpleNamespace(call=_interpreted_call(sources[-1], gpu))

    with (
        patch.object(GraphLowering, "compile_to_module", load_interpreted),
        patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)),
    ):
        yield


def _interpreted_call(source: str, gpu: Gpu) -> Callable[[list[Any]], Any]:
    namespace: dict[str, Any] = {"__name__": "interpreted", "__file__": "interpreted.py"}
    exec(source.replace("device(type='cuda', index=0)", "device(type='cpu')"), namespace)
    namespace["empty_strided_cuda"] = namespace["empty_strided_cpu"]

    def call(arguments: list[Any]) -> Any:
        with fake_gpu(gpu), interpreter(), _no_device_guard():
            return namespace["call"](arguments)

    return call


@contextlib.contextmanager
def _no_device_guard() -> Iterator[None]:
    with (
        patch.object(torch.cuda, "_DeviceGuard", contextlib.nullcontext),
        patch.object(torch.cuda, "set_device", lambda _: None),
    ):
        yield


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Triton functions that are defined or called meanwhile are interpreted."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, TRITON_INTERPRET="1"))
        # What it rewrote relies on names that it left in these modules, which are removed below.
        stack.enter_context(patch.dict(InterpretedFunction.rewritten_fn, clear=True))
        stack.callback(_restore, [(owner, dict(vars(owner))) for owner in _PATCHED])
        for library in _LIBRARIES:
            for name, function in vars(library).copy().items():
                if isinstance(function, JITFunction):
                    setattr(library, name, InterpretedFunction(function.fn))
        # The helpers' own reductions are generic, a hundred times slower to interpret.
        for name, reduction in (("max2", tl.max), ("min2", tl.min)):
            setattr(triton_helpers, name, reduction)
        triton_helpers.libdevice = LIBDEVICE
        tl.inline_asm_elementwise = inline_asm_elementwise
        tl.dot_scaled = dot_scaled
        for name, function in PRODUCTS.items():
            stack.enter_context(patch.object(InterpreterBuilder, name, function))
        yield


def _restore(snapshots: list[tuple[Any, dict[str, Any]]]) -> None:
    for owner, before in snapshots:
        for name, now in dict(vars(owner)).items():
            if name not in before:
                delattr(owner, name)
            elif before[name] is not now:
                setattr(owner, name, before[name])
