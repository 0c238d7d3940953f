"""Run a module's calls as compiled programs; calls that none can take go another way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fp4compile.generated import GeneratedGraph, KernelCall
from fp4compile.program.capture import Capture, capture
from fp4compile.program.merge_siblings import merge_siblings
from fp4compile.program.owners import Owners
from fp4compile.program.regions import Region, cut
from fp4compile.program.replace_attention import replace_attention
from fp4compile.program.replay import Recording, Replays
from fp4compile.program.values import (
    CacheMemo,
    Flattened,
    NotFlat,
    Results,
    argument_names,
    fill,
    initialize_caches,
    new_layer,
)

logger = logging.getLogger(__name__)

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
        shape_env = captured.fake_mode.shape_env
        assert shape_env is not None
        self._sizes = Sizes([node.meta["val"] for node in captured.inputs], shape_env)
        self.regions, self.kernels = len(regions), len(compiled)
        runs = [region.run for region in compiled.values()]
        self._replays = Replays(
            self._evaluate, record and partial(record, runs), captured.constants.values()
        )

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors have sizes that the program was compiled for."""
        return self._sizes.hold(tensors)

    @property
    def repeats(self) -> bool:
        """Whether steps of the last cache are repeated, kernel by kernel."""
        return self._replays.taped

    def __call__(self, flat: Flattened) -> Any:
        returned = self._replays(flat)
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


class Dispatcher:
    """Calls ``module`` through programs compiled on first use; ``otherwise`` takes the rest.

    ``record``: makes what records the kernels of compiled regions, so that steps are repeated.
    """

    def __init__(
        self,
        module: nn.Module,
        compile_region: CompileRegion,
        otherwise: Callable[..., Any],
        record: Record | None = None,
    ) -> None:
        self._module, self._compile_region, self._record = module, compile_region, record
        self._otherwise = otherwise
        self._names = argument_names(module)
        # By key: sizes decide which of a list takes a call.
        self.by_kind: dict[Any, list[Program]] = {}
        self._owners: Owners | None = None
        self._memo = CacheMemo()
        self._declined: set[str] = set()

    @property
    def programs(self) -> int:
        """How many were compiled."""
        return sum(map(len, self.by_kind.values()))

    @property
    def generated(self) -> list[GeneratedGraph]:
        """The code of every program."""
        return [program.generated for known in self.by_kind.values() for program in known]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch.export or an outer torch.compile
            return self._module._call_impl(*args, **kwargs)
        if _dynamo_is_off():
            return self._otherwise(*args, **kwargs)
        kwargs |= zip(self._names, args, strict=False)
        args = args[len(self._names) :]
        try:
            initialize_caches(self._module, args, kwargs)
            if torch.is_autocast_enabled("cpu"):
                raise NotFlat("autocast")
            flat = Flattened((self._module.training, args, kwargs), self._memo)
            program = self._program(flat, args, kwargs)
        except NotFlat as reason:
            self._decline(str(reason))
            return self._otherwise(*args, **kwargs)
        with torch.no_grad():
            return program(flat)

    def _program(self, flat: Flattened, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        if self._owners is None or not self._owners.unchanged():
            self.by_kind.clear()
            self._owners = Owners(self._module)
        self._owners.check_hooks()
        known = self.by_kind.setdefault(flat.key, [])
        for program in known:
            if program.takes(flat.tensors):
                return program
        captured = _captured(self._module, args, kwargs, flat)
        program = Program(captured, self._compile_region, self._record)
        known.append(program)
        logger.info(
            "compiled a call of %d regions, %d of them different", program.regions, program.kernels
        )
        return program

    def _decline(self, reason: str) -> None:
        if reason not in self._declined:
            self._declined.add(reason)
            logger.warning(
                "a call of %s is compiled by Dynamo, slower to start and to run than a program: %s",
                type(self._module).__name__,
                reason,
            )


def _captured(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], flat: Flattened
) -> Capture:
    try:
        return capture(module, args, kwargs, flat)
    except NotFlat:
        raise
    except Exception as error:
        # Whatever a forward does that cannot be traced; where the forward itself is wrong, it will
        # raise the same on its other way.
        reason = str(error).strip().partition("\n")[0]
        raise NotFlat(f"it cannot be traced: {type(error).__name__}: {reason}") from error


def _dynamo_is_off() -> bool:
    """By ``torch.compiler.set_stance`` or an environment variable of torch's, as for debugging."""
    return bool(eval_frame._stance.stance != "default" or dynamo_config.disable)
