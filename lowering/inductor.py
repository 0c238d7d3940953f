"""Privates of torch._inductor; those of Triton templates are in inductor_gpu.py.

Facts it relies on, checked by tests/lowering: CppTemplate renders twice (once to name the
arguments, once with the epilogue that the scheduler fused); Inductor's on-disk cache does not see
out-of-tree lowerings, hence :class:`SourceHash`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor import lowering as inductor_lowering  # must precede codegen.cpp_template
from torch._inductor.codecache import CppCodeCache
from torch._inductor.codegen.cpp_gemm_template import (
    gen_2d_view_of_epilogue_buf,
    get_export_declaration,
)
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import register_decomposition
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import Placeholder, parallel_num_threads
from torch._inductor.virtualized import V, ops
from torch._subclasses.fake_tensor import FakeTensorMode

import fp4compile
from fp4compile.errors import CompileError
from fp4compile.lowering.problem import ActivationProblem, GemmProblem, bfloat16_bits

TESTED_TORCH = ((2, 12), (2, 15))  # first supported, first not yet tried
PACKAGE_ROOTS = (Path(fp4compile.__file__).parent, Path(__file__).parent)
SOURCE_SUFFIXES = (".py", ".jinja", ".cpp")


def check_torch_version(version: str = torch.__version__) -> None:
    """Raise CompileError where the privates used here were never run."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    first, beyond = TESTED_TORCH
    if not first <= release < beyond:
        raise CompileError(
            f"torch {version} was never tried with fp4compile's Inductor lowerings; "
            f"install torch >= {first[0]}.{first[1]}, < {beyond[0]}.{beyond[1]}"
        )


def cpp_compiler() -> str:
    """The command that Inductor compiles C++ with.

    Raises:
        CompileError: there is none.
    """
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(
            f"Inductor finds no C++ compiler ({error}); install gcc/g++, or name one in CXX"
        ) from error


@cache
def source_hash() -> str:
    """Hash of every source of fp4compile and its lowerings."""
    digest = hashlib.sha256()
    for root in PACKAGE_ROOTS:
        for path in sorted(p for p in root.rglob("*") if p.suffix in SOURCE_SUFFIXES):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class SourceHash(CustomGraphPass):
    """Does nothing to the graph; its uuid puts our sources and choices into the cache key."""

    def __init__(self, settings: Callable[[], str]) -> None:
        self.settings = settings

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return f"fp4compile-{source_hash()}-{self.settings()}"


def install_source_hash(settings: Callable[[], str]) -> None:
    """Append :class:`SourceHash` to whatever the user has in the slot."""
    present = inductor_config.post_grad_custom_pre_pass
    inductor_config.post_grad_custom_pre_pass = _with_source_hash(present, settings)


def _with_source_hash(present: Any, settings: Callable[[], str]) -> list[Any]:
    chain = list(present) if isinstance(present, (list, tuple)) else [present] if present else []
    if any(isinstance(item, SourceHash) for item in chain):
        return chain
    return [*chain, SourceHash(settings)]


def source_hash_installed() -> bool:
    """Whether the slot still holds our pass (a user may have assigned it after our import)."""
    present = inductor_config.post_grad_custom_pre_pass
    chain = present if isinstance(present, (list, tuple)) else [present]
    return any(isinstance(item, SourceHash) for item in chain)


def compile_graph(
    module: torch.fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None,
    options: dict[str, Any],
    settings: Callable[[], str],
) -> Callable[..., Any]:
    """Inductor on a Dynamo graph, ``mode`` and ``options`` as those of ``torch.compile``."""
    slot = "post_grad_custom_pre_pass"
    wrapper = torch._TorchCompileInductorWrapper(mode, options, dynamic=None)
    if slot in wrapper.config:
        wrapper.config[slot] = _with_source_hash(wrapper.config[slot], settings)
    compiled: Callable[..., Any] = wrapper(module, example_inputs)
    return compiled


@contextlib.contextmanager
def saved_code(save: Callable[[str], None]) -> Iterator[None]:
    """Calls ``save`` with the text of every graph generated, or found in a cache, inside."""
    before = GraphLowering.save_output_code

    def both(code: str) -> None:
        save(code)
        if before is not None:
            before(code)

    with patch.object(GraphLowering, "save_output_code", both):
        yield


class _TextTemplate(CppTemplate):
    """A kernel for ``problem`` from its text ``source``.

    ``inputs`` maps the names used in the text to realized, contiguous buffers.
    """

    def __init__(
        self,
        name: str,
        source: str,
        problem: Any,
        inputs: dict[str, Any],
        layout: ir.Layout,
    ) -> None:
        super().__init__(name, list(inputs.values()), layout, parallel_num_threads())
        self.source = source
        self.problem = problem
        self.input_names = tuple(inputs)


class GemmTemplate(_TextTemplate):
    """A two-dimensional GEMM whose kernel text comes from a target."""

    def render(self, **kwargs: Any) -> str:
        """Text of the kernel; the scheduler's call adds the epilogue that it fused."""
        kernel = kwargs["kernel"]
        out = _Output(
            kwargs.get("template_buffer_node") or self.output_node,
            bool(kwargs.get("flag_template_buffer_has_other_users")),
            kwargs.get("epilogue_nodes") or [],
        )
        with contextlib.ExitStack() as stack:
            for buffer in out.fake_buffers:
                stack.enter_context(
                    patch.object(V.graph, "get_dtype", self._fake_get_dtype(buffer))
                )
            return _parsed(self.source).render(
                kernel=kernel,
                header=self.header().getvalue(),
                export=get_export_declaration(),
                marker=json.dumps(
                    {
                        "kernel": self.name.removeprefix("fp4_"),
                        "problem": str(self.problem),
                        "epilogue": _operations(kwargs.get("epilogue_nodes") or []),
                    }
                ),
                problem=self.problem,
                bfloat16_bits=bfloat16_bits,
                operand_type=DTYPE_TO_CPP[self.problem.operand_dtype],
                inputs=dict(zip(self.input_names, self.input_nodes, strict=True)),
                out=out,
                # Unless the user fixed a number, torch.set_num_threads holds at run time.
                threads=None if inductor_config.cpp.threads < 1 else self.num_threads,
                define_tile=lambda rows, columns: kernel.define_buffer(
                    "tile", [rows, columns], torch.float32
                ),
                store=lambda rows, columns: self._store(kernel, out, rows, columns),
            )

    def _store(
        self, kernel: Any, out: _Output, rows: tuple[str, str], columns: tuple[str, str]
    ) -> str:
        """Text that carries ``tile`` through the fused epilogue to rows x columns of the result."""
        tile = kernel.slice_nd(
            kernel.local_buffers["tile"],
            [("0", f"{rows[1]} - {rows[0]}"), ("0", f"{columns[1]} - {columns[0]}")],
        )
        return kernel.store_output(
            kernel.slice_nd(out.matrix, [rows, columns]),
            tile,
            out.gemm,
            out.epilogue,
            offsets=(rows[0], columns[0]),
            reindexers=out.reindexers,
        )


class OneKernelTemplate(_TextTemplate):
    """A kernel that stores its one result itself."""

    def render(self, **kwargs: Any) -> str:
        """Text of the kernel."""
        result = kwargs.get("template_buffer_node") or self.output_node
        assert not kwargs.get("epilogue_nodes")  # see one_kernel
        return _parsed(self.source).render(
            kernel=kwargs["kernel"],
            header=self.header().getvalue(),
            export=get_export_declaration(),
            problem=self.problem,
            operand_type=DTYPE_TO_CPP[self.problem.dtype],
            inputs=dict(zip(self.input_names, self.input_nodes, strict=True)),
            result=result,
            threads=None if inductor_config.cpp.threads < 1 else self.num_threads,
        )


class ActivationTemplate(_TextTemplate):
    """Rows of an activation to an operand and its scales: two results of one kernel."""

    def results(self, layouts: Sequence[ir.Layout]) -> list[Any]:
        """IR nodes of the operand and its scale.

        As Inductor's grouped GEMM makes them; but its ``generate``, which prepares for a benchmark
        among choices, wants all results alike.
        """
        template: Any = self  # annotated as a CUTLASS template
        buffer = ir.CppTemplateBuffer(
            layout=self.layout,
            inputs=self.input_nodes,
            make_kernel_render=self._kernel_and_render,
            template=template,
            choice=None,
        )
        ir.TensorBox.create(buffer)  # registers it
        results = [ir.MultiOutput(layout, buffer, [(list, i)]) for i, layout in enumerate(layouts)]
        buffer.layout = ir.MultiOutputLayout(device=self.layout.device)
        buffer.outputs = list(results)
        # The text stores its results itself; what follows is another kernel.
        V.graph.no_fuse_buffer_names.add(buffer.get_name())
        return [ir.TensorBox.create(result) for result in results]

    def _kernel_and_render(
        self, buffer: Any, *_: Any, epilogue_nodes: Any = None, **__: Any
    ) -> Any:
        assert not epilogue_nodes  # see no_fuse_buffer_names
        kernel = CppTemplateKernel(str(Placeholder.KERNEL_NAME), self.num_threads)
        return kernel, partial(kernel.render, self, outputs=buffer.outputs)

    def render(self, **kwargs: Any) -> str:
        """Text of the kernel, without the results that nobody uses."""
        operand, _ = kwargs["outputs"]
        outputs = dict(zip(("operand", "operand_scale"), kwargs["outputs"], strict=True))
        return _parsed(self.source).render(
            kernel=kwargs["kernel"],
            header=self.header().getvalue(),
            export=get_export_declaration(),
            problem=self.problem,
            operand_type=DTYPE_TO_CPP[operand.get_dtype()],
            inputs=dict(zip(self.input_names, self.input_nodes, strict=True)),
            outputs={
                name: buffer
                for name, buffer in outputs.items()
                if buffer.get_name() not in V.graph.removed_buffers
            },
            threads=None if inductor_config.cpp.threads < 1 else self.num_threads,
        )


@cache
def _parsed(source: str) -> Any:
    # A model renders a handful of texts hundreds of times; parsing was most of its lowering time.
    return CppTemplate._template_from_string(source)


class _Output:
    """Where a template's result goes: gemm -> (copy) -> template buffer -> epilogue -> written."""

    def __init__(self, node: Any, has_other_users: bool, epilogue: list[Any]) -> None:
        self.gemm = node
        self.epilogue: list[Any] = []
        self.reindexers: list[Any] = []
        self.fake_buffers: list[Any] = []
        aliased: list[str] = []
        if has_other_users:
            # The tile is local, so the users outside the epilogue need a copy in memory.
            self.gemm = ir.Buffer(name=f"{node.get_name()}_gemm", layout=node.layout)
            self.epilogue.append(_copy(self.gemm, node))
            self.fake_buffers.append(self.gemm)
            self.reindexers.append(None)
            aliased.append(self.gemm.get_name())
        elif epilogue:
            aliased.append(node.get_name())
        self.written = node
        self.matrix = node
        if epilogue:
            self.epilogue.extend(epilogue)
            self.written = epilogue[-1]
            self.matrix, self.reindexers = gen_2d_view_of_epilogue_buf(
                self.written, node, epilogue, self.reindexers, [None] * len(epilogue)
            )
        self.aliases = dict.fromkeys(aliased, self.written.get_name())


def _operations(nodes: list[Any]) -> list[str]:
    """Names of the operations that ``nodes`` of an epilogue came from."""
    # As the user's graph had them: silu, not the four operations that it was decomposed into.
    originals = [o.meta.get("original_aten") for node in nodes for o in node.get_origins()]
    return sorted({op._opname for op in originals if isinstance(op, torch._ops.OpOverload)})


def _copy(source: Any, destination: Any) -> Any:
    load = source.make_loader()
    dtype = destination.get_dtype()
    data = ir.Pointwise(
        device=source.get_device(),
        dtype=dtype,
        ranges=source.get_size(),
        inner_fn=lambda index: ops.to_dtype(load(index), dtype),
    )
    return ir.ComputedBuffer(name=destination.get_name(), layout=destination.layout, data=data)


def compile_region(
    graph: torch.fx.Graph, fake_mode: FakeTensorMode
) -> Callable[[list[Any]], Sequence[Any]]:
    """A function of a list of the placeholders of ``graph`` (it empties the list) that returns the
    outputs.

    ``node.meta["val"]`` of the placeholders says what they are, sizes perhaps symbolic.
    """
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    kernels: list[Any] = []

    def keep(module: Any, example_inputs: Any, **kwargs: Any) -> Any:
        kernels.append(compile_fx_inner(module, example_inputs, **kwargs))
        return kernels[-1]

    context = TracingContext(fake_mode)
    with (
        tracing(context),
        torch.no_grad(),
        # A hit in AOTAutograd's cache would not show us the kernels; Inductor's is enough.
        functorch_config.patch(enable_autograd_cache=False),
        # Whoever calls has checked the sizes; a check per buffer takes longer than its kernel.
        inductor_config.patch(size_asserts=False, alignment_asserts=False),
    ):
        whole: Any = compile_fx(torch.fx.GraphModule({}, graph), inputs, inner_compile=keep)
    if len(kernels) == 1 and _adds_nothing(context.fw_metadata, len(inputs)):
        return kernels[0].current_callable
    return lambda arguments: whole(*arguments)


def _adds_nothing(metadata: Any, inputs: int) -> bool:
    """Whether AOTAutograd's wrapper, which takes longer than a small kernel, only hands on."""
    return (
        metadata is not None
        and len(metadata.input_info) == inputs
        and not metadata.mutated_inp_runtime_indices
        and not metadata.num_intermediate_bases
        and not metadata.tokens
        and all(info.output_type is OutputType.non_alias for info in metadata.output_info)
    )


def namespace(run: Callable[..., Any]) -> dict[str, Any] | None:
    """The globals of the generated module that ``run``, from :func:`compile_region`, is of; None
    where AOTAutograd's wrapper is around it.
    """
    function = getattr(run, "__func__", None)
    return None if function is None else function.__globals__


def load_native(source: str) -> Any:
    """The library, as of ctypes, that C++ ``source`` compiles to; compiled once."""
    return CppCodeCache.load(source)


def register(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the lowering of ``op`` from realized inputs to an IR node."""
    # Otherwise a producer with several consumers is computed once per consumer.
    inductor_lowering.add_needs_realized_inputs([op])
    return inductor_lowering.register_lowering(op, type_promotion_kind=None)


def register_as_aten(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a plain-torch equivalent of ``op``, which Inductor then fuses like any other."""
    return register_decomposition([op])


def eager_reference(op: Any) -> Callable[..., Any]:
    """A lowering that calls the op's eager kernel."""
    return inductor_lowering.fallback_handler(op, add_to_fallback_set=False)


def static_int(size: Any) -> int:
    """Value of a size that is fixed for a model; adds a guard where it is symbolic."""
    return int(V.graph.sizevars.guard_int(size))


def known_int(size: Any) -> int | None:
    """Value of a size, or None if it is symbolic."""
    return None if getattr(size, "free_symbols", None) else int(size)


def as_matrix(node: Any) -> Any:
    """``node`` realized, contiguous and viewed as ``[rows, last dimension]``."""
    columns = node.get_size()[-1]
    node = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))
    viewed = inductor_lowering.view(ir.TensorBox(node), [-1, columns])
    return ir.ExternKernel.realize_input(viewed)


def as_vector(node: Any) -> Any:
    """``node`` realized, contiguous and viewed with one dimension."""
    node = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))
    return ir.ExternKernel.realize_input(inductor_lowering.view(ir.TensorBox(node), [-1]))


def contiguous(node: Any) -> Any:
    """``node`` realized and contiguous."""
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))


def split(node: Any, sizes: Sequence[int]) -> list[Any]:
    """Views of the last dimension, one after the other."""
    ends = list(accumulate(sizes))
    return [
        inductor_lowering.slice_(node, -1, end - size, end)
        for end, size in zip(ends, sizes, strict=True)
    ]


def to_dtype(node: Any, dtype: torch.dtype) -> Any:
    return inductor_lowering.to_dtype(node, dtype)


def gemm(
    name: str, source: str, problem: GemmProblem, inputs: dict[str, Any], batch: Sequence[Any]
) -> Any:
    """IR node ``[*batch, N]`` computed by the kernel text ``source``."""
    matrix = inputs["operand"]
    size = [matrix.get_size()[0], problem.N]
    layout = ir.FixedLayout(matrix.get_device(), problem.out_dtype, size)
    template = GemmTemplate(name, source, problem, _distinct(inputs), layout)
    return inductor_lowering.view(template.generate().output_node(), [*batch, problem.N])


def grouped_gemm(name: str, source: str, problem: GemmProblem, inputs: dict[str, Any]) -> Any:
    """IR node ``[S, N]`` of a stack of weights, computed by the kernel text ``source``."""
    matrix = inputs["operand"]
    size = [matrix.get_size()[0], problem.N]
    layout = ir.FixedLayout(matrix.get_device(), problem.out_dtype, size)
    template = GemmTemplate(name, source, problem, _distinct(inputs), layout)
    return _unfused(template)


def _unfused(template: Any) -> Any:
    """The result of a text that stores it itself; what follows is another kernel."""
    result = template.generate().output_node()
    V.graph.no_fuse_buffer_names.add(result.get_name())
    return result


def one_kernel(
    name: str,
    source: str,
    problem: Any,
    inputs: dict[str, Any],
    strides: Sequence[Any] | None = None,
) -> Any:
    """IR node of the size and dtype of the first input, computed by the kernel text ``source``,
    contiguous unless ``strides`` say otherwise.
    """
    first = next(iter(inputs.values()))
    layout = ir.FixedLayout(first.get_device(), first.get_dtype(), first.get_size(), strides)
    template = OneKernelTemplate(name, source, problem, _distinct(inputs), layout)
    return _unfused(template)


def quantize_rows(
    name: str,
    source: str,
    problem: ActivationProblem,
    inputs: dict[str, Any],
    operand_dtype: torch.dtype,
    batch: Sequence[Any],
) -> tuple[Any, Any]:
    """IR nodes of the operand ``[*batch, K]`` and its scale, computed by the text ``source``."""
    rows, columns = inputs["x"].get_size()
    device = inputs["x"].get_device()
    scales = {"tensor": [1], "token": [rows, 1]}.get(problem.granularity) or [rows, problem.blocks]
    operand_layout = ir.FixedLayout(device, operand_dtype, [rows, columns])
    scale_layout = ir.FixedLayout(device, torch.float32, scales)
    template = ActivationTemplate(name, source, problem, _distinct(inputs), operand_layout)
    operand, scale = template.results([operand_layout, scale_layout])
    shape = [] if problem.granularity == "tensor" else [*batch, scales[-1]]
    return (
        inductor_lowering.view(operand, [*batch, columns]),
        inductor_lowering.view(scale, shape),
    )


def _distinct(inputs: dict[str, Any]) -> dict[str, Any]:
    """Copies what appears twice: a kernel's arguments are told apart by their buffer's name."""
    seen: set[str] = set()
    result = {}
    for name, node in inputs.items():
        if node.get_name() in seen:
            node = ir.ExternKernel.copy_input(node)
        seen.add(node.get_name())
        result[name] = node
    return result
