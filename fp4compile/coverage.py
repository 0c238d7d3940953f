"""The coverage contract: what generated code serves every weight, read from that code."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from fp4compile.batches import Batch, only_example
from fp4compile.errors import CompileError
from fp4compile.generated import GeneratedGraph, KernelCall
from fp4compile.kernels import REFERENCE
from fp4compile.program.dispatch import Dispatcher
from fp4compile.report import Report
from fp4compile.tensor import FP4Tensor

logger = logging.getLogger(__name__)

# Left in high precision because the caller said so; anything else fails strict=True.
WISHED = ("in ignore", "not in targets", "the spec keeps")


@dataclass(frozen=True)
class SiteCoverage:
    """How one FP4 weight is served, over all graphs compiled so far.

    ``kernels``: of its GEMM ("cpp_avx512", ...), and "inductor" where it is looked up.
    ``epilogues``: the distinct sets of operations fused behind its GEMM. ``reason``: why a kernel
    is the eager reference, or that none reads the weight; empty if all is well.
    """

    name: str
    weight_format: str
    activation_format: str | None
    kernels: tuple[str, ...]
    epilogues: tuple[tuple[str, ...], ...]
    reason: str = ""


@dataclass(frozen=True)
class Coverage:
    """Every FP4 site, and why other weights are in ``high_precision``."""

    sites: tuple[SiteCoverage, ...]
    high_precision: Mapping[str, str]
    graphs: int

    @property
    def failures(self) -> tuple[str, ...]:
        """What breaks the contract: each a weight and the reason."""
        unserved = [f"{site.name}: {site.reason}" for site in self.sites if site.reason]
        unasked = [
            f"{name}: {why}"
            for name, why in self.high_precision.items()
            if not why.startswith(WISHED)
        ]
        return (*unserved, *unasked)

    def summary(self) -> str:
        """One line."""
        kernels = Counter("+".join(site.kernels) or "no kernel" for site in self.sites)
        fused = sum(any(site.epilogues) for site in self.sites)
        return (
            f"{len(self.sites)} FP4 weights in {self.graphs} graphs: "
            + ", ".join(f"{count} x {name}" for name, count in kernels.items())
            + f"; {fused} with a fused epilogue; {len(self.high_precision)} weights in high "
            f"precision; {len(self.failures)} against the contract"
        )


@dataclass(eq=False)  # torch.compile takes equal backends for the same
class Recorder:
    """A backend that does what ``compile`` does with Dynamo's graphs and keeps what the generated
    code says; a model's programs keep theirs.
    """

    compile: Callable[..., Any]
    lowering: Any
    graphs: list[GeneratedGraph] = field(default_factory=list)

    def __call__(
        self, module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Callable[..., Any]:
        codes: list[str] = []
        with self.lowering.saved_code(codes.append):
            compiled: Callable[..., Any] = self.compile(module, example_inputs, **options)
        owners = _owners(example_inputs)
        weights = {i: frozenset({owner}) for i, owner in enumerate(owners) if owner}
        for code in codes:
            calls = attributed(self.lowering, code, len(owners))
            self.graphs.append(GeneratedGraph(calls, weights))
        return compiled


def attributed(lowering: Any, code: str, expected: int) -> tuple[KernelCall, ...]:
    """The kernel calls in generated ``code``, of a graph that has ``expected`` inputs."""
    inputs, calls = lowering.calls_in(code)
    if calls and inputs != expected:
        logger.warning(
            "a graph has %d inputs where %d were expected: its code cannot be attributed",
            inputs,
            expected,
        )
        return ()
    found: tuple[KernelCall, ...] = calls
    return found


# Of every compiled model; not an attribute, since a copy of the model is not compiled.
_RECORDERS: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()


def recorded(model: nn.Module, compile: Callable[..., Any], lowering: Any) -> Recorder:
    """The backend to compile ``model`` with, so that :func:`verify` knows its code."""
    _RECORDERS[model] = recorder = Recorder(compile, lowering)
    return recorder


def _owners(example_inputs: Sequence[Any]) -> list[int]:
    """For every input of the flat graph, the id of the FP4 weight whose codes it is, else 0."""
    owners: list[int] = []
    for value in example_inputs:
        if isinstance(value, FP4Tensor):
            parts = value.__tensor_flatten__()[0]
            owners += [id(value) if part == "packed_weight" else 0 for part in parts]
        else:
            owners.append(0)
    return owners


def verify(model: nn.Module, *args: Any, strict: bool = False, **kwargs: Any) -> Coverage:
    """What the generated code of a compiled model does with each weight.

    Args:
        model: compiled by ``compile_model`` or ``quantize_and_compile``.
        args, kwargs: a call of the model, made first. Without one a model that was never called
            is called with what it was traced with, or a Hugging Face model's ``dummy_inputs``.
        strict: raise unless every weight of two or more dimensions is served by generated FP4
            code, but those that ``targets=``, ``ignore=`` or the spec left out.

    Raises:
        CompileError: the model is not compiled, was never called and no call is known; or, if
            ``strict``, the contract is broken: the message names the weights and the reasons.
    """
    recorder = _RECORDERS.get(model)
    if recorder is None:
        raise CompileError("the model is not compiled; call fp4compile.compile_model(model) first")
    if args or kwargs or not _generated(model, recorder):
        if not args and not kwargs:
            args, kwargs = traced_call(model)
        with torch.no_grad():
            model(*args, **kwargs)
    graphs = _generated(model, recorder)
    coverage = Coverage(
        tuple(
            _site(model, name, parameter, graphs)
            for name, parameter in model.named_parameters()
            if isinstance(parameter, FP4Tensor)
        ),
        _high_precision(model),
        len(graphs),
    )
    if strict and coverage.failures:
        raise CompileError(
            f"{len(coverage.failures)} weights are not served by generated FP4 code:\n"
            + "\n".join(coverage.failures)
        )
    return coverage


def _generated(model: nn.Module, recorder: Recorder) -> list[GeneratedGraph]:
    """The code of Dynamo's graphs and of the programs, one graph each."""
    call = model._compiled_call_impl
    programs = call.generated if isinstance(call, Dispatcher) else []
    return [*recorder.graphs, *programs]


def traced_call(model: nn.Module) -> Batch:
    """A call that ``model`` understands.

    Raises:
        CompileError: none is known.
    """
    report = getattr(model, "fp4_report", None)
    if isinstance(report, Report) and report.example is not None:
        return report.example
    if hasattr(model, "dummy_inputs"):
        return only_example(None, model)
    raise CompileError(
        "no call of this model is known (it was not quantized in this process); "
        "give the inputs of one"
    )


def _site(
    model: nn.Module, name: str, weight: FP4Tensor, graphs: Sequence[GeneratedGraph]
) -> SiteCoverage:
    calls = [call for graph in graphs for call in graph.of(weight)]
    kernels = tuple(dict.fromkeys(call.kernel for call in calls))
    report = getattr(model, "fp4_report", None)
    choice = report.kernels.get(name) if isinstance(report, Report) else None
    reason = ""
    if not calls:
        reason = "no generated code reads it"
    elif REFERENCE in kernels:
        reason = f"eager reference: {choice.reason if choice else 'see the log of fp4compile'}"
    return SiteCoverage(
        name,
        weight.weight_format,
        weight.activation_format,
        kernels,
        tuple(dict.fromkeys(call.epilogue for call in calls if call.problem)),
        reason,
    )


def _high_precision(model: nn.Module) -> dict[str, str]:
    """Weights of two or more dimensions that are not FP4, with the reasons known."""
    report = getattr(model, "fp4_report", None)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    known = report.skipped if isinstance(report, Report) else getattr(config, "skipped", {})
    return {
        name: known.get(name, "not quantized")
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and parameter.is_floating_point()
        and not isinstance(parameter, FP4Tensor)
    }
