"""Compiling with a forced CPU target, and random operands of fp4::linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from fp4compile import lowering
from fp4compile.formats import by_name
from fp4compile.lowering.choice import SEEN
from fp4compile.lowering.targets import CPU_TARGETS, CppTarget
from fp4compile.lowering.testing.standalone import Layer
from fp4compile.packing import pack


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Every test compiles anew and leaves neither a forced target nor a thread count behind."""
    threads, forced = torch.get_num_threads(), lowering.config.cpu_target
    torch._dynamo.reset()
    SEEN.clear()
    torch.manual_seed(0)
    # A graph of an earlier run, found on disk, would choose nothing.
    with (
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(fx_graph_cache=False),
    ):
        yield
    lowering.config.cpu_target = forced
    torch.set_num_threads(threads)


@pytest.fixture(params=CPU_TARGETS, ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> CppTarget:
    """Each CPU target in turn, forced, but those whose instructions this CPU lacks: there the eager
    op would be compared with itself.
    """
    if reason := request.param.supports(Layer(request.param.name, 8, 8, "e2m1").problem):
        pytest.skip(f"{reason}; tests/lowering/test_kernels.py emulates AMX and NEON")
    lowering.config.cpu_target = request.param.name
    return request.param


@pytest.fixture
def compiled() -> Callable[..., Any]:
    """Puts a function under Inductor, with sizes that may change from call to call."""
    return partial(torch.compile, backend="inductor", dynamic=True, fullgraph=True)


@pytest.fixture
def fusions() -> Callable[[], int]:
    """How many epilogues were fused so far; Inductor's first graph puts a new Counter there."""
    return lambda: torch._dynamo.utils.counters["inductor"]["cpp_epilogue_fusion_counter"]


@dataclass
class Weight:
    """A random packed weight ``[N, K]`` with scales per row and perhaps a bias."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    format: str

    @staticmethod
    def random(N: int, K: int, format: str, bias: torch.dtype | None = None) -> Weight:
        bits = by_name(format).bits
        codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
        return Weight(
            pack(codes, bits),
            torch.rand(N) + 0.1,
            None if bias is None else torch.randn(N).to(bias),
            format,
        )


@pytest.fixture
def random_weight() -> Callable[..., Weight]:
    """``random_weight(N, K, format, bias=None)``."""
    return Weight.random


@pytest.fixture
def int8_operand() -> Callable[..., Tensor]:
    """Random int8 of the given shape; all of int8, so that the largest sums occur as well."""
    return lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8)
