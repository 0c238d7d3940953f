"""Run a module's calls as compiled programs; calls that none can take go another way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from fp4compile.program.capture import Capture, capture
from fp4compile.program.merge_siblings import merge_siblings
from fp4compile.program.regions import Region, cut
from fp4compile.program.values import (
    Flattened,
    NotFlat,
    Results,
    fill,
    initialize_caches,
    new_layer,
)

logger = logging.getLogger(__name__)

CompileRegion = Callable[[Region, Any], Callable[..., Sequence[Any]]]


@dataclass(frozen=True)
class Step:
    """One region: ``run`` takes ``values`` at ``inputs`` and puts its results at ``outputs``."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Program:
    """A compiled kind of call."""

    def __init__(self, captured: Capture, compile_region: CompileRegion) -> None:
        merge_siblings(captured)
        regions = cut(captured.graph)
        placeholders = [*captured.inputs, *captured.constants]
        produced = [node for region in regions for node in region.outputs]
        place = {node: index for index, node in enumerate([*placeholders, *produced])}
        self._values: list[Any] = [None] * len(place)
        for node, tensor in captured.constants.items():
            self._values[place[node]] = tensor
        compiled: dict[str, Callable[..., Sequence[Any]]] = {}
        for region in regions:
            if region.key not in compiled:
                compiled[region.key] = compile_region(region, captured.fake_mode)
        self._steps = tuple(
            Step(
                compiled[region.key],
                tuple(place[node] for node in region.inputs),
                tuple(place[node] for node in region.outputs),
            )
            for region in regions
        )
        (returned,) = captured.graph.find_nodes(op="output")[0].args
        self._returned = tuple(
            (place[node], None) if isinstance(node, fx.Node) else (-1, node) for node in returned
        )
        self._results = captured.results
        self._sizes = Sizes(
            [node.meta["val"] for node in captured.inputs], captured.fake_mode.shape_env
        )
        self.regions, self.kernels = len(regions), len(compiled)

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors have sizes that the program was compiled for."""
        return self._sizes.hold(tensors)

    def __call__(self, tensors: Sequence[Tensor], caches: Sequence[Any]) -> Any:
        values = self._values.copy()
        values[: len(tensors)] = tensors
        for step in self._steps:
            results = step.run(*[values[index] for index in step.inputs])
            for index, result in zip(step.outputs, results, strict=True):
                values[index] = result
        returned = [values[index] if index >= 0 else constant for index, constant in self._returned]
        _update_caches(self._results, returned, caches)
        return fill(self._results.result, returned, caches)


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

    def __init__(self, fakes: Sequence[Tensor], shape_env: ShapeEnv) -> None:
        self._fakes, self._shape_env = tuple(fakes), shape_env
        self._expression: str | None = None
        self._known: dict[tuple[Any, ...], bool] = {}

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        sizes = tuple(tensor.shape for tensor in tensors)
        if sizes not in self._known:
            self._known[sizes] = self._check(tensors)
        return self._known[sizes]

    def _check(self, tensors: Sequence[Tensor]) -> bool:
        if self._expression is None:
            self._expression = self._shape_env.produce_guards_expression(self._fakes) or "True"
        return bool(self._shape_env.evaluate_guards_expression(self._expression, tensors))


class Dispatcher:
    """Calls ``module`` through programs compiled on first use; ``otherwise`` takes the rest."""

    def __init__(
        self, module: nn.Module, compile_region: CompileRegion, otherwise: Callable[..., Any]
    ) -> None:
        self._module, self._compile_region = module, compile_region
        self._otherwise = otherwise
        # By key: sizes decide which of a list takes a call.
        self.by_kind: dict[Any, list[Program]] = {}
        self._declined: set[str] = set()

    @property
    def programs(self) -> int:
        """How many were compiled."""
        return sum(map(len, self.by_kind.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self._module.training:
            return self._otherwise(*args, **kwargs)
        try:
            initialize_caches(self._module, args, kwargs)
            flat = Flattened((args, kwargs))
            program = self._program(flat, args, kwargs)
        except (NotFlat, GuardOnDataDependentSymNode, DataDependentOutputException) as reason:
            self._decline(reason)
            return self._otherwise(*args, **kwargs)
        with torch.no_grad():
            return program(flat.tensors, flat.caches)

    def _program(self, flat: Flattened, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        known = self.by_kind.setdefault(flat.key, [])
        for program in known:
            if program.takes(flat.tensors):
                return program
        program = Program(
            capture(self._module, args, kwargs, len(flat.tensors)), self._compile_region
        )
        known.append(program)
        logger.info(
            "compiled a call of %d regions, %d of them different", program.regions, program.kernels
        )
        return program

    def _decline(self, reason: Exception) -> None:
        text = f"{type(reason).__name__}: {reason}"
        if text not in self._declined:
            self._declined.add(text)
            logger.warning("a call is compiled by Dynamo, slower to start and to run: %s", text)
