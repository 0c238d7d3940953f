"""A compiled kind of call: its regions, run one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fp4compile.generated import GeneratedGraph, KernelCall
from fp4compile.program.capture import Capture
from fp4compile.program.merge_siblings import merge_siblings
from fp4compile.program.regions import Region, cut
from fp4compile.program.replace_attention import replace_attention
from fp4compile.program.replay import Recording, Replays
from fp4compile.program.results import Results, fill, new_layer
from fp4compile.program.values import Flattened

REMEMBERED = 256
Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class CompiledRegion:
    """``run`` computes the outputs from a list of the inputs; ``calls`` are those in its code."""

    run: Run
    calls: tuple[KernelCall, ...] = ()


CompileRegion = Callable[[Region, Any], CompiledRegion]
Record = Callable[[Sequence[Run]], Recording]


@dataclass(frozen=True)
class Step:
    """One region: ``run`` takes ``arguments``, in which constants stand already; ``inputs`` says
    which value fills which of the other positions, ``outputs`` where the results go.
    """

    run: Run
    arguments: list[Any]
    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[int, ...]


class Program:
    """A compiled kind of call."""

    def __init__(
        self, captured: Capture, compile_region: CompileRegion, record: Record | None
    ) -> None:
        merge_siblings(captured)
        replace_attention(captured)
        regions = cut(captured.graph)
        produced = [node for region in regions for node in region.outputs]
        place = {node: index for index, node in enumerate([*captured.inputs, *produced])}
        self._size = len(place)
        compiled: dict[str, CompiledRegion] = {}
        for region in regions:
            if region.key not in compiled:
                compiled[region.key] = compile_region(region, captured.fake_mode)
        self._steps = [
            _step(region, compiled[region.key].run, captured.constants, place) for region in regions
        ]
        self.generated = _generated(regions, compiled, captured.codes)
        (returned,) = captured.graph.find_nodes(op="output")[0].args
        self._returned = tuple(
            (place[node], None) if node in place else (-1, captured.constants.get(node, node))
            for node in returned
        )
        self._results = captured.results
        # A static cache is written in place.
        self._changes_caches = any(
            state.attributes for states in captured.results.cache_states for state in states
        )
        shape_env = captured.fake_mode.shape_env
        assert shape_env is not None
        self._sizes = Sizes([node.meta["val"] for node in captured.inputs], shape_env)
        self.regions, self.kernels = len(regions), len(compiled)
        runs = [region.run for region in compiled.values()]
        self._replays = Replays(
            self._evaluate, record and partial(record, runs), captured.constants.values()
        )

    def takes(self, flat: Flattened) -> bool:
        """Whether the tensors have sizes that the program was compiled for."""
        return self._replays.recorded(flat) is not None or self._sizes.hold(flat.tensors)

    @property
    def repeats(self) -> bool:
        """Whether steps of the last cache are repeated, kernel by kernel."""
        return self._replays.taped

    def __call__(self, flat: Flattened) -> Any:
        returned = self._replays(flat)
        if self._changes_caches:
            _update_caches(self._results, returned, flat.caches)
        return fill(self._results.result, returned, flat.caches)

    def _evaluate(self, tensors: Sequence[Tensor]) -> list[Any]:
        values = [*tensors, *[None] * (self._size - len(tensors))]
        for step in self._steps:
            arguments = step.arguments.copy()
            for position, index in step.inputs:
                arguments[position] = values[index]
            for index, result in zip(step.outputs, step.run(arguments), strict=True):
                values[index] = result
        return [values[index] if index >= 0 else constant for index, constant in self._returned]


def _step(
    region: Region, run: Run, constants: dict[fx.Node, Tensor], place: dict[fx.Node, int]
) -> Step:
    return Step(
        run,
        [constants.get(node) for node in region.inputs],
        tuple(
            (position, place[node])
            for position, node in enumerate(region.inputs)
            if node not in constants
        ),
        tuple(place[node] for node in region.outputs),
    )


def _generated(
    regions: Sequence[Region],
    compiled: Mapping[str, CompiledRegion],
    codes: Mapping[fx.Node, frozenset[int]],
) -> GeneratedGraph:
    """What the code of all regions does, as one graph of which the inputs are the codes."""
    numbers = {node: number for number, node in enumerate(codes)}

    def call_in(region: Region, call: KernelCall) -> KernelCall:
        read = [region.inputs[position] for position in call.inputs]
        return replace(call, inputs=frozenset(numbers[node] for node in read if node in numbers))

    calls = [call_in(region, call) for region in regions for call in compiled[region.key].calls]
    return GeneratedGraph(tuple(calls), {numbers[node]: owners for node, owners in codes.items()})


def _update_caches(results: Results, values: Sequence[Any], caches: Sequence[Any]) -> None:
    for cache, states in zip(caches, results.cache_states, strict=True):
        for index, state in enumerate(states):
            if index == len(cache.layers):
                cache.layers.append(new_layer(state, values))
                continue
            layer = cache.layers[index]
            for name, template in state.attributes.items():
                setattr(layer, name, fill(template, values, ()))


class Sizes:
    """Which sizes of a call's tensors a program was traced for."""

    def __init__(self, fakes: Sequence[Any], shape_env: ShapeEnv) -> None:
        self._fakes, self._shape_env = tuple(fakes), shape_env
        self._expression: str | None = None
        self._known: dict[tuple[Any, ...], bool] = {}

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        sizes = tuple(tensor.shape for tensor in tensors)
        if sizes not in self._known:
            if len(self._known) == REMEMBERED:  # a growing cache has new sizes at every step
                self._known.clear()
            self._known[sizes] = self._check(tensors)
        return self._known[sizes]

    def _check(self, tensors: Sequence[Tensor]) -> bool:
        if self._expression is None:
            self._expression = self._shape_env.produce_guards_expression(self._fakes) or "True"
        return bool(self._shape_env.evaluate_guards_expression(self._expression, tensors))
