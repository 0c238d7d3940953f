"""Where the time of a quantized model goes: each kernel of its compiled graph, beside 16 bits."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fp4compile.batches import Batch, as_batches
from fp4compile.compile import load_lowerings
from fp4compile.errors import EvaluationError
from fp4compile.evaluate import Spread
from fp4compile.plain_weights import use_plain_weights
from fp4compile.tensor import FP4Tensor
from fp4compile.timing import Benchmark, Measured, OpTime

# Kind of work -> the names that kernels and ops of it have in a profile; the first match counts.
KINDS: dict[str, re.Pattern[str]] = {
    "FP4 GEMM": re.compile(r"_fp4_linear_"),
    "rounding of activations": re.compile(r"_fp4_quantize_activation_"),
    "fused element-wise": re.compile(r"^graph_\d+_cpp_fused"),
    "attention": re.compile(r"scaled_dot_product|flash_attention"),
    "GEMM in 16 or 32 bits": re.compile(
        r"^(aten::(mm|addmm|bmm|baddbmm|linear)|mkl|onednn|graph_)"
    ),
    "other ops": re.compile(r"^(aten|fp4|prims)::"),
}
RUNTIME = "runtime"  # Python, guards, allocation: what is in no kernel


def benchmark(
    model: nn.Module,
    inputs: Any,
    *,
    baseline: torch.dtype | None = torch.bfloat16,
    repetitions: int = 9,
) -> Benchmark:
    """Time a quantized model's compiled forward, as a whole and kernel by kernel.

    Model and baseline take turns, so a drift of the machine hits both. The model is compiled for
    this with Inductor's kernel profile and stays as it is.

    Args:
        inputs: one call of the forward: a tensor, a tuple of tensors, or a dict of arguments.
        baseline: dtype of a copy with the FP4 weights dequantized, which is compiled and measured
            too; None for none.
        repetitions: timed calls of each, after one that compiles and one that warms up.

    Raises:
        EvaluationError: the model holds no FP4 weight, is not on a CPU, or there is nothing to
            repeat.
        CalibrationDataError: ``inputs`` do not fit the forward.
    """
    _check(model, repetitions)
    args, kwargs = as_batches([inputs], model)[0]
    load_lowerings()
    calls = {"quantized": _compiled(model, args, kwargs)}
    if baseline is not None:
        calls["baseline"] = _compiled(
            dequantized_copy(model, baseline), *_cast((args, kwargs), baseline)
        )
    with torch.no_grad():
        seconds = _take_turns(calls, repetitions)
        found = {name: _measured(call, seconds[name], repetitions) for name, call in calls.items()}
    return Benchmark(
        _shapes(args, kwargs),
        torch.get_num_threads(),
        repetitions,
        found["quantized"],
        found.get("baseline"),
        None if baseline is None else str(baseline).removeprefix("torch."),
    )


def dequantized_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` in ``dtype`` whose weights have the values that the FP4 codes mean.

    Activations are not rounded in it.
    """
    return use_plain_weights(copy.deepcopy(model)).to(dtype)


def _check(model: nn.Module, repetitions: int) -> None:
    if not any(isinstance(parameter, FP4Tensor) for parameter in model.parameters()):
        raise EvaluationError(
            "the model holds no FP4 weight; call fp4compile.quantize(model, data) before benchmark"
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise EvaluationError(
            f"the model is on {', '.join(sorted(devices))}; benchmark profiles kernels on the CPU, "
            "so call model.to('cpu') first"
        )
    if repetitions < 1:
        raise EvaluationError(f"repetitions={repetitions} measures nothing; give at least 1")


def _compiled(model: nn.Module, args: Any, kwargs: Any) -> Callable[[], object]:
    # The forward, not the module: that may be compiled already.
    forward = torch.compile(
        model.forward,
        backend="inductor",  # has the lowerings by now
        dynamic=True,
        options={"cpp.enable_kernel_profile": True},
    )
    return lambda: forward(*args, **kwargs)


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    args, kwargs = batch
    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _take_turns(
    calls: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    for call in calls.values():
        call()  # compiles
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _measured(call: Callable[[], object], seconds: list[float], repetitions: int) -> Measured:
    """The parts come from profiled calls, and are shares of those: a profile costs time itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(repetitions):
            call()
        total = time.perf_counter() - start
    ops = []
    for event in profiled.key_averages():
        kind = kind_of(event.key)
        if kind != RUNTIME:
            own = event.self_cpu_time_total / 1e6
            calls = event.count / repetitions
            name = re.sub(r"^graph_\d+_", "", event.key)
            ops.append(OpTime(name, kind, calls, own / repetitions, own / total))
    left = max(total - sum(op.seconds for op in ops) * repetitions, 0.0)
    outside = OpTime("outside of kernels", RUNTIME, 1, left / repetitions, left / total)
    ranked = sorted([*ops, outside], key=lambda op: -op.seconds)
    return Measured(Spread.of(seconds), tuple(ranked))


def kind_of(name: str) -> str:
    """Kind of work of a profile's event."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), RUNTIME)


def _shapes(args: Any, kwargs: Any) -> dict[str, tuple[int, ...]]:
    named = {**{f"argument {index}": value for index, value in enumerate(args)}, **kwargs}
    return {name: tuple(x.shape) for name, x in named.items() if isinstance(x, Tensor)}
