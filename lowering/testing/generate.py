"""``compile_for``: the code that a GPU would run, generated and compiled where no GPU is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_compiler
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_map_only

from fp4compile.errors import CompileError
from fp4compile.lowering.gpus import Gpu
from fp4compile.lowering.testing.device import fake_gpu
from fp4compile.lowering.testing.machine_code import MachineCode, machine_code
from fp4compile.siblings import merge_siblings

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
    """What backend ``fp4compile`` makes of ``function(*inputs)`` for ``gpu``, one item per graph.

    Args:
        function: a module or function whose tensors are on the CPU; it also runs there, eagerly.
        inputs: positional arguments.
        dynamic: as for ``torch.compile``.

    Raises:
        CompileError: the graph holds a tensor that is neither parameter nor input.
    """
    graphs: list[Generated] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = merge_siblings(graph, inputs)
        with fake_gpu(gpu) as autotuners, _sources() as sources:
            compiled_on_gpu(graph)
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
        # A parameter that requires grad would be a leaf on a device that is not there; a symbolic
        # float is read back from it.
        with torch.no_grad(), dynamo_config.patch(specialize_float=True):
            compiled = torch.compile(
                lambda *args: function(*args), backend=backend, dynamic=dynamic
            )
            return compiled(*inputs)
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, CompileError):
            raise failure.inner_exception from None
        raise
    finally:
        torch.compiler.reset()


@contextlib.contextmanager
def _sources() -> Iterator[list[str]]:
    sources: list[str] = []
    with patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)):
        yield sources


def compiled_on_gpu(graph: fx.GraphModule) -> Callable[..., Any]:
    """Inductor's callable for a Dynamo graph of the CPU, moved to the GPU.

    Tensor subclasses and Python's indexing are first traced away on the CPU: indexing guards the
    device, and there is no guard for a GPU in a build without one.
    """

    def move(traced: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        inputs = [_moved(node.meta["val"]) for node in traced.graph.find_nodes(op="placeholder")]
        return cast(Callable[..., Any], compile_fx(_on_gpu(traced), inputs))

    inputs = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    return aot_module_simplified(
        graph, inputs, fw_compiler=make_boxed_compiler(move), decompositions=_decompositions()
    )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Ours, which index."""
    return {op: rule for op, rule in select_decomp_table().items() if op.namespace == "fp4"}


def _moved(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_DEVICE)


def _on_gpu(graph: fx.GraphModule) -> fx.GraphModule:
    constants = [node.target for node in graph.graph.find_nodes(op="get_attr")]
    if any(isinstance(getattr(graph, str(name), None), torch.Tensor) for name in constants):
        raise CompileError(
            f"the graph holds the constants {constants}, which are on the CPU; "
            "register them as buffers"
        )
    for node in graph.graph.nodes:
        node.args = tree_map_only(torch.device, lambda _: _DEVICE, node.args)
        if "device" in node.kwargs:
            node.update_kwarg("device", _DEVICE)
    graph.recompile()
    return graph
