"""Parts of a quantized weight mean what the whole does; their products add up to its product."""

from __future__ import annotations

import threading

import pytest
import torch

import fp4compile
from fp4compile.errors import ShardingError
from fp4compile.shards import (
    channel_multiple,
    columns,
    gathered_linear,
    looked_up,
    rows,
    summed_linear,
)
from fp4compile.tensor import FP4Tensor

N, K, PARTS = 40, 64, 2
BLOCK = fp4compile.TensorSpec(4, ("e2m1", "e1m2"), "block", block_size=16)
W4A4 = fp4compile.QuantSpec.preset("w4a4")
# Name -> spec, method, whether the sum over parts is exact.
CASES = {
    "static": (W4A4, "fpq", True),
    "token": (W4A4.per_token(), "fpq", True),
    "token-without-shifts": (W4A4.per_token(), "minmax", True),
    "six-bits": (fp4compile.QuantSpec.preset("w6a6"), "fpq", True),
    "weight-only": (fp4compile.QuantSpec.preset("w4a16"), "minmax", False),
    "blocks": (fp4compile.QuantSpec(BLOCK, BLOCK, BLOCK), "minmax", False),
    "blocks-weight-only": (fp4compile.QuantSpec(BLOCK, None, BLOCK), "minmax", False),
}


def make(case: str) -> tuple[FP4Tensor, torch.Tensor, bool]:
    spec, method, exact = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(3, 50, K) * torch.exp2(torch.randn(K) * 1.5)
    linear = torch.nn.Linear(K, N, bias=False)
    # Nothing before the linear could absorb its exponent shifts.
    fp4compile.quantize(linear, [x], spec, method=method, progress=False)
    assert isinstance(linear.weight, FP4Tensor)
    return linear.weight, x, exact and linear.weight.operand_of(x)[0].dtype == torch.int8


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return make(request.param)


def together(parts: int, function) -> list[torch.Tensor]:
    """``function(index, all_reduce)`` in as many threads, which reduce over each other."""
    barrier, shared = threading.Barrier(parts), [None] * parts
    found: list[torch.Tensor] = [torch.empty(0)] * parts

    def work(index: int) -> None:
        def all_reduce(tensor: torch.Tensor, operation: str) -> None:
            shared[index] = tensor.clone()
            barrier.wait(20)
            stacked = torch.stack(shared)
            barrier.wait(20)
            tensor.copy_(stacked.sum(0) if operation == "sum" else stacked.amax(0))

        found[index] = function(index, all_reduce)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_rows_and_columns_mean_what_the_whole_does(case):
    weight, x, _ = case
    whole = weight.dequantize()
    parts = [rows(weight, [(0, 8), (20, 28)]), rows(weight, [(8, 20), (28, N)])]
    order = [*range(8), *range(20, 28), *range(8, 20), *range(28, N)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole[order])
    y = torch.cat([part.linear(x, None) for part in parts], dim=-1)
    torch.testing.assert_close(y, weight.linear(x, None)[..., order])
    left, right = columns(weight, 0, 32), columns(weight, 32, K)
    assert torch.equal(torch.cat((left.dequantize(), right.dequantize()), dim=1), whole)
    assert left.stored_bytes < weight.stored_bytes


def test_parts_along_k_add_up(case):
    weight, x, exact = case
    bias = torch.randn(N)
    size = K // PARTS

    def part(index: int, all_reduce) -> torch.Tensor:
        channels = slice(index * size, (index + 1) * size)
        held = columns(weight, channels.start, channels.stop)
        return summed_linear(x[..., channels], held, bias, all_reduce)

    expected = weight.linear(x, bias)
    for y in together(PARTS, part):
        if exact:
            assert torch.equal(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_rows_behind_gathered_channels_are_those_of_the_whole(case):
    weight, x, _ = case
    bias = torch.randn(N)
    calls = {"input": x, "output": weight.linear(x, bias)}

    def all_gather(part: torch.Tensor) -> torch.Tensor:
        whole = calls["input" if part.shape[-1] == K // 2 else "output"]
        assert torch.equal(part, whole[..., : part.shape[-1]])
        return whole

    held = rows(weight, [(0, N // 2)])
    y = gathered_linear(x[..., : K // 2], held, bias[: N // 2], all_gather)
    assert y.shape == (3, 50, N)


def test_a_divided_vocabulary_looks_up_the_same_rows(case):
    weight, _, _ = case
    ids = torch.tensor([[0, 19, 20, 39], [7, 39, 21, 0]])

    def half(index: int, all_reduce) -> torch.Tensor:
        start = 20 * index
        return looked_up(ids, rows(weight, [(start, start + 20)]), start, all_reduce)

    found = together(2, half)
    assert all(torch.equal(part, weight.lookup(ids)) for part in found)


@pytest.mark.parametrize(("case", "multiple"), [("static", 2), ("six-bits", 4), ("blocks", 16)])
def test_cuts_that_divide_what_belongs_together_are_refused(case, multiple):
    weight, _, _ = make(case)
    assert channel_multiple(weight.weight_format, weight.block_size, weight.rotation) == multiple
    columns(weight, multiple, 2 * multiple)
    with pytest.raises(ShardingError, match=f"multiples of {multiple}"):
        columns(weight, 0, multiple // 2)
    turned = weight.with_attributes(rotation=32)
    with pytest.raises(ShardingError, match="multiples of 32"):
        columns(turned, 16, 64)
    ordered = weight.with_attributes()
    ordered.channel_order = torch.arange(K, dtype=torch.int32)
    with pytest.raises(ShardingError, match="ordered by their exponent shifts"):
        columns(ordered, 0, 32)
