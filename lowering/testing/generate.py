"""``compile_for``: the code that a GPU would run, generated and compiled where no GPU is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_map_only
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from fp4compile.errors import CompileError
from fp4compile.lowering.gpus import Gpu
from fp4compile.lowering.testing.device import fake_gpu
from fp4compile.lowering.testing.machine_code import MachineCode, machine_code


_DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Generated:
    """One graph's output: the Python module that Inductor wrote, and its Triton kernels compiled,
    one for every configuration that a run would choose among. Graphs ascend by time of compilation.
    """

    source: str
    kernels: tuple[MachineCode, ...]


def compile_for(
    function: Callable[..., Any], inputs: Sequence[Any], gpu: Gpu, *, dynamic: bool | None = None
) -> tuple[Generated, ...]:
    """What ``torch.compile`` makes of ``function(*inputs)`` for ``gpu``, one item per graph.

    Args:
        function: a module or function whose tensors are on the CPU; it also runs there, eagerly.
        inputs: positional arguments.
        dynamic: as for ``torch.compile``.

    Raises:
        CompileError: the graph holds a tensor that is neither parameter nor input.
    """
    graphs: list[Generated] = []

    def backend(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        with fake_gpu(gpu) as autotuners, _sources() as sources:
            compile_fx(on_gpu(graph), placeholders_on_gpu(graph))
        kernels = [machine_code(result) for tuner in autotuners for result in tuner.compile_results]
        graphs.extend(Generated(source, tuple(kernels)) for source in sources)
        return graph.forward

    run(function, inputs, backend, dynamic)
    return tuple(graphs)


def run(
    function: Callable[..., Any], inputs: Sequence[Any], backend: Any, dynamic: bool | None
) -> Any:
    """``function(*inputs)`` through a Dynamo backend that leaves nothing behind."""
    torch.compiler.reset()
    try:
        # A parameter that requires grad would be a leaf on a device that is not there.
        with torch.no_grad():
            compiled = torch.compile(lambda *args: function(*args), backend=backend, dynamic=dynamic)
            return compiled(*inputs)
    finally:
        torch.compiler.reset()


@contextlib.contextmanager
def _sources() -> Iterator[list[str]]:
    sources: list[str] = []
    with patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)):
        yield sources


def placeholders_on_gpu(graph: fx.GraphModule) -> list[Any]:
    """Fake inputs of a Dynamo graph, on the GPU."""
    nodes = graph.graph.find_nodes(op="placeholder")
    return [_on_gpu(node.meta["example_value"]) for node in nodes]


def _on_gpu(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if is_traceable_wrapper_subclass(value):
        return transform_subclass(value, lambda _, inner: _on_gpu(inner))
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_DEVICE)


def on_gpu(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph`` that makes its new tensors on the GPU."""
    constants = [node.target for node in graph.graph.find_nodes(op="get_attr")]
    if any(isinstance(getattr(graph, str(name), None), torch.Tensor) for name in constants):
        raise CompileError(
            f"the graph holds the constants {constants}; register them as buffers, so that they are "
            "inputs that can be on a GPU"
        )
    moved = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in moved.graph.nodes:
        node.args = tree_map_only(torch.device, lambda _: _DEVICE, node.args)
        if "device" in node.kwargs:
            node.update_kwarg("device", _DEVICE)
    moved.recompile()
    return moved
