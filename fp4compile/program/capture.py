"""Trace one call of a module to a graph of aten and fp4 ops, its tensors given as inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp4compile.program.owners import attributes_kept
from fp4compile.program.results import Results, states
from fp4compile.program.values import Flattened, NotFlat, fixed_dims, substitute
from fp4compile.tensor import FP4Tensor


@dataclass(frozen=True)
class Parameters:
    """A module's parameters and buffers as plain tensors.

    ``tensors``: each once, the inner ones of tensor subclasses. ``parts``: name -> (a tensor
    subclass or None, indices into ``tensors``).
    """

    tensors: tuple[Tensor, ...]
    parts: dict[str, tuple[Tensor | None, tuple[int, ...]]]

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        tensors: list[Tensor] = []
        known: dict[int, tuple[Tensor | None, tuple[int, ...]]] = {}
        parts = {}
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        for name, value in named:
            if id(value) not in known:
                leaves = _inner(value)
                indices = tuple(range(len(tensors), len(tensors) + len(leaves)))
                tensors.extend(leaves)
                outer = value if is_traceable_wrapper_subclass(value) else None
                known[id(value)] = (outer, indices)
            parts[name] = known[id(value)]
        return cls(tuple(tensors), parts)

    def codes(self) -> dict[int, int]:
        """Which of ``tensors`` are codes, and the ids of their FP4 weights."""
        return {
            indices[outer.__tensor_flatten__()[0].index("packed_weight")]: id(outer)
            for outer, indices in self.parts.values()
            if isinstance(outer, FP4Tensor)
        }

    def restore(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameters and buffers by name, made of ``tensors`` in place of their own."""
        made: dict[tuple[int, ...], Tensor] = {}
        for outer, indices in self.parts.values():
            if indices in made:
                continue
            plain = [tensors[index] for index in indices]
            made[indices] = plain[0] if outer is None else _rewrap(outer, plain)
        return {name: made[indices] for name, (_, indices) in self.parts.items()}


def _inner(value: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(value):
        return [value.detach()]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


def _rewrap(outer: Tensor, plain: Sequence[Tensor]) -> Tensor:
    names, context = outer.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = dict(zip(names, plain, strict=True))
    return type(outer).__tensor_unflatten__(inner, context, outer.shape, outer.stride())  # type: ignore[attr-defined]


BLOCK = "fp4compile_block"


@dataclass(frozen=True)
class Capture:
    """``graph`` returns ``results.values``; its placeholders are the ``constants``, with their
    tensors, and the tensors of the call, ``inputs``. ``node.meta[BLOCK]`` is the number of the
    repeated block that a node belongs to, or None. ``codes``: of the constants that are codes, the
    ids of the FP4 weights whose they are.
    """

    graph: fx.Graph
    constants: dict[fx.Node, Tensor]
    codes: dict[fx.Node, frozenset[int]]
    inputs: tuple[fx.Node, ...]
    results: Results
    fake_mode: FakeTensorMode


def capture(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], flat: Flattened
) -> Capture:
    """Trace ``module(*args, **kwargs)``, of which ``flat`` holds the tensors.

    Sizes of the call's tensors are symbolic but for 0 and 1; parameters are inputs of fixed size.
    Tensors in ``args`` and ``kwargs`` are not touched.

    Raises:
        NotFlat: the forward changes its modules, or takes or returns what programs cannot.
    """
    parameters = Parameters.of(module)
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    fixed = [_fake(fake_mode, tensor, range(tensor.dim())) for tensor in parameters.tensors]
    free = [
        _fake(fake_mode, tensor, fixed_dims(tensor) if index in flat.cached else ())
        for index, tensor in enumerate(flat.tensors)
    ]
    results: list[Results] = []
    marks: list[_Mark] = []

    def run(*inputs: Tensor) -> list[Any]:
        own, rest = inputs[: len(fixed)], iter(inputs[len(fixed) :])
        caches: list[Any] = []
        call_args, call_kwargs = substitute((args, kwargs), lambda _: next(rest), caches)
        before = states(caches)
        with attributes_kept(module), _watch_blocks(module, marks), _uncompiled(module):
            state = parameters.restore(own)
            given = dict(state)
            result = torch.func.functional_call(module, state, call_args, call_kwargs)
        replaced = [name for name, value in given.items() if state[name] is not value]
        if replaced:
            raise NotFlat(f"a forward that replaces {', '.join(replaced)}")
        results.append(Results(result, caches, before))
        return results[-1].values

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake_mode)
        stack.enter_context(enable_python_dispatcher())
        traced = make_fx(run)(*fixed, *free)
    _number_blocks(traced.graph, marks)
    placeholders = traced.graph.find_nodes(op="placeholder")
    constants = dict(zip(placeholders, parameters.tensors, strict=False))
    inputs = tuple(placeholders[len(constants) :])
    codes = {placeholders[i]: frozenset({owner}) for i, owner in parameters.codes().items()}
    constants |= _lift_attributes(traced, fake_mode)
    return Capture(traced.graph, constants, codes, inputs, results[-1], fake_mode)


def _lift_attributes(module: fx.GraphModule, mode: FakeTensorMode) -> dict[fx.Node, Tensor]:
    """Tensors that the forward made of numbers become constants as parameters are."""
    lifted = {}
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = getattr(module, str(node.target))
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            placeholder = module.graph.placeholder(node.name)
        placeholder.meta = {"val": _fake(mode, tensor, range(tensor.dim())), BLOCK: None}
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        lifted[placeholder] = tensor
    return lifted


def _fake(mode: FakeTensorMode, tensor: Tensor, fixed: Sequence[int]) -> Tensor:
    sizes = [DimDynamic.STATIC if dim in fixed else DimDynamic.DUCK for dim in range(tensor.dim())]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(tensor, symbolic_context=context)


@contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """Calls of ``module`` run its forward, not what it was compiled to."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Children of the outermost module lists of which all are of one class."""
    blocks: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            blocks.extend(members)
        else:
            blocks.extend(repeated_blocks(child))
    return blocks


# The last node before a block and its last node.
_Mark = tuple[fx.Node, fx.Node]


@contextmanager
def _watch_blocks(module: nn.Module, marks: list[_Mark]) -> Iterator[None]:
    entered: list[fx.Node] = []

    def enter(*_: Any) -> None:
        entered.append(_last_node())

    def leave(*_: Any) -> None:
        marks.append((entered.pop(), _last_node()))

    handles = []
    for block in repeated_blocks(module):
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_node() -> fx.Node:
    mode = get_proxy_mode()
    assert mode is not None
    return next(iter(reversed(mode.tracer.graph.nodes)))


def _number_blocks(graph: fx.Graph, marks: list[_Mark]) -> None:
    starts = {before: number for number, (before, _) in enumerate(marks)}
    ends = {last for _, last in marks}
    block: int | None = None
    for node in graph.nodes:
        node.meta[BLOCK] = block
        if node in ends:
            block = None
        block = starts.get(node, block)
