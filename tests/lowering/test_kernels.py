"""Laws of the CPU's kernels over formats, granularities, dtypes, rows and numbers of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4compile.blocks import per_channel
from fp4compile.formats import by_name
from fp4compile.lowering.problem import INT8
from fp4compile.lowering.testing.standalone import Layer, Library
from fp4compile.packing import pack, unpack_blocks, unpack_values

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCKS = {"granularity": "block"}
WEIGHT_ONLY = {"operand": FP32, "granularity": None}
# Below, at and above every tile and every switch between kernels.
ROWS = (0, 1, 2, 3, 4, 5, 9, 16, 17, 31, 33, 64, 131, 400)
# Odd N and K, rows that end within a byte, a group of bytes or a vector, tails of every kind.
CASES: tuple[dict[str, Any], ...] = (
    {"N": 67, "K": 131, "format": "e2m1", "bias": True},
    {"N": 5, "K": 1, "format": "e3m0", "granularity": "tensor"},
    {"N": 33, "K": 777, "format": "e1m2", "granularity": None},
    {"N": 70, "K": 233, "format": "e2m3", "bias": True},
    {"N": 17, "K": 66, "format": "e1m4", "granularity": "tensor"},
    {"N": 65, "K": 301, "format": "e1m6"},
    {"N": 31, "K": 130, "format": "e3m2", "operand": BF16},
    {"N": 66, "K": 259, "format": "e4m3", "operand": BF16, "bias": True},
    {"N": 19, "K": 127, "format": "e2m5"},
    {"N": 34, "K": 97, "format": "e3m4", "operand": FP32, "granularity": None},
    {"N": 9, "K": 515, "format": "e5m2", "operand": FP16, "granularity": None},
    {"N": 37, "K": 205, "format": "e2m1", "operand": FP32, "granularity": None},
    {"N": 35, "K": 333, "format": "e2m1|e1m2", **BLOCKS, "block_size": 32},
    {"N": 18, "K": 135, "format": "e1m2|e3m0", "operand": BF16, **BLOCKS, "block_size": 16},
    {"N": 21, "K": 177, "format": "e2m3|e1m4", **BLOCKS, "block_size": 32},
    {"N": 6, "K": 100, "format": "e1m6", "block_size": 64, "bias": True},
    {"N": 11, "K": 70, "format": "e4m3|e3m4", "operand": BF16, **BLOCKS, "block_size": 32},
    {"N": 128, "K": 256, "format": "e2m1"},
    {"N": 70, "K": 2248, "format": "e2m1|e1m2", **BLOCKS, "block_size": 32},
    {"N": 65, "K": 640, "format": "e1m2|e2m1", **BLOCKS, "block_size": 16},
    {"N": 13, "K": 1040, "format": "e2m1|e3m0", "block_size": 64},
    {"N": 16, "K": 2304, "format": "e1m2", "granularity": "tensor", "block_size": 128},
    {"N": 39, "K": 1160, "format": "e2m1|e1m2", **WEIGHT_ONLY, "block_size": 32},
    {"N": 15, "K": 4170, "format": "e2m1", "operand_format": "e2m1"},
)


# Of AMX only the tiles are its own: more than one panel on either route, and an operand of parts.
AMX_CASES: tuple[dict[str, Any], ...] = (
    {"N": 67, "K": 777, "format": "e2m1", "bias": True},
    {"N": 37, "K": 301, "format": "e2m1", "operand": FP16, "granularity": None},
)
# Every width, with and without block scales and two formats of them.
NEON_CASES = tuple(CASES[index] for index in (0, 3, 5, 12, 14))
# Compiling takes the time, so only one target has them all.
TARGETS = {
    "cpp_amx": AMX_CASES,
    "cpp_avx512": CASES,
    "cpp_avx2": CASES[1::2],
    "cpp_neon": NEON_CASES,
    "cpp_portable": CASES[::2],
}
ALL = [Layer(name, **case) for name, cases in TARGETS.items() for case in cases]
LAYERS = [layer for layer in ALL if layer.served]
EXACT = [layer for layer in LAYERS if layer.problem.route == INT8 and not layer.block_size]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("kernels"), LAYERS)


def weight_of(layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
    """float64 ``[N, K]``: what codes and scales mean."""
    packed, scale = tensors["packed_weight"], tensors["weight_scale"]
    if layer.block_size:
        codes = tensors["block_scale"]
        return unpack_blocks(packed, codes, scale, layer.format, layer.block_size, layer.K).double()
    return unpack_values(packed, by_name(layer.format), layer.K).double() * scale[:, None]


def is_the_product(layer: Layer, y: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Whether ``y`` is the product to a few float32 roundings of its terms."""
    x, weight = tensors["operand"].double(), weight_of(layer, tensors)
    scale = tensors.get("operand_scale")
    if layer.granularity == "block":
        x = x * per_channel(scale, layer.block_size, layer.K)
    elif scale is not None:
        x = x * scale
    bias = tensors.get("bias", torch.zeros(layer.N)).double()
    bound = x.abs() @ weight.abs().t() + bias.abs()
    return bool(((y - (x @ weight.t() + bias)).abs() <= 1e-6 * bound).all())


def check(library: Library, layer: Layer, M: int, threads: int) -> None:
    """The kernel is the eager op, and the same whatever the number of threads."""
    tensors = layer.weights() | layer.operands(M)
    torch.set_num_threads(1)
    y = library.run(layer, tensors)
    torch.set_num_threads(threads)
    assert torch.equal(library.run(layer, tensors), y), "depends on the number of threads"
    if layer in EXACT:
        assert torch.equal(y, layer.eager(tensors))
    else:
        assert is_the_product(layer, y, tensors)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_kernel_is_eager(library: Library, layer: Layer) -> None:
    for M in ROWS:
        check(library, layer, M, threads=2)


@pytest.mark.parametrize("layer", EXACT, ids=str)
def test_the_largest_sums_are_exact(library: Library, layer: Layer) -> None:
    fmt, largest = layer.problem.format, layer.problem.largest_operand
    for value in (fmt.max_integer, -fmt.max_integer):
        codes = torch.full((layer.N, layer.K), fmt.integer_values.index(value), dtype=torch.uint8)
        for operand in (-largest, min(largest, 127)):
            tensors = layer.weights() | layer.operands(5) | {"packed_weight": pack(codes, fmt.bits)}
            tensors["operand"].fill_(operand)
            assert torch.equal(library.run(layer, tensors), layer.eager(tensors))


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layer=st.sampled_from(LAYERS),
    M=st.integers(1, 1000),
    threads=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_whatever_the_rows_threads_and_numbers(
    library: Library, layer: Layer, M: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    check(library, layer, M, threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(Layer("cpp_portable", **case)))
def test_every_problem_has_a_kernel_on_any_cpu(case: dict[str, Any]) -> None:
    assert Layer("cpp_portable", **case).served


def test_sums_that_leave_int32_decline() -> None:
    assert not Layer("cpp_portable", 1, 2**17, "e1m6").served
    assert Layer("cpp_portable", 1, 2**17, "e1m6", block_size=32).served
