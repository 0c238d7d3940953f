"""The fp4:: ops: the exact integer law, schemas and fake kernels."""

from __future__ import annotations

import pytest
import torch

from fp4compile import ops
from fp4compile.formats import FORMATS, by_name, of_width
from fp4compile.numerics import dequantize, quantize, scale_for_max
from fp4compile.packing import pack, unpack_values

INTEGER = [fmt for fmt in FORMATS.values() if fmt.fits_int8]
SHAPES = ((1, 1, 1), (3, 5, 7), (4, 33, 64))


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", INTEGER, ids=lambda fmt: fmt.name)
def test_linear_accumulates_like_int32(fmt, shape):
    m, n, k = shape
    operand = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    packed = pack(random_codes(n, k, fmt.bits), fmt.bits)
    one = torch.ones(n)
    got = ops.linear(operand, None, packed, one, None, fmt.name, torch.float32)
    weight = unpack_values(packed, fmt, k).to(torch.int32)
    expected = operand.to(torch.int32) @ weight.t()
    assert torch.equal(got, expected.to(torch.float32))


def test_linear_is_exact_where_float32_sums_would_round():
    fmt, k = by_name("e3m0"), 20_000
    operand = torch.full((1, k), 127, dtype=torch.int8)
    operand[0, 0] = 126
    packed = pack(torch.full((1, k), 7, dtype=torch.uint8), 4)
    packed[0, -1] = 0x10  # the last two values are 0 and 1
    got = ops.linear(operand, None, packed, torch.ones(1), None, fmt.name, torch.float64)
    expected = float(126 * 64 + (k - 3) * 127 * 64 + 127)
    assert got.item() == torch.tensor(expected, dtype=torch.float32).item()


def test_the_epilogue_scales_by_token_then_channel_then_adds_the_bias():
    operand = torch.randint(-96, 97, (2, 3, 16), dtype=torch.int8)
    packed = pack(random_codes(5, 16, 4), 4)
    token, channel, bias = torch.rand(2, 3, 1), torch.rand(5), torch.randn(5)
    plain = ops.linear(operand, None, packed, torch.ones(5), None, "e2m1", torch.float32)
    got = ops.linear(operand, token, packed, channel, bias, "e2m1", torch.bfloat16)
    assert torch.equal(got, (plain * token * channel + bias).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["divides", "folded"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_quantized_activations_dequantize_to_the_nearest_grid_point(
    fmt, granularity, folded, dtype
):
    x = (torch.randn(2, 5, 32) * 3).to(dtype)
    shift = torch.randint(0, fmt.max_shift + 1, (32,), dtype=torch.int8).clamp(max=6)
    scale = torch.tensor(0.9 if granularity == "token" else 8.0 / fmt.max_integer)
    operand, operand_scale = ops.quantize_activation(x, scale, shift, fmt.name, granularity, folded)
    assert operand.dtype == (torch.int8 if fmt.fits_int8 else torch.bfloat16)
    factor = 2.0 ** shift.to(torch.float32)
    reduced = x.to(torch.float32) if folded else x.to(torch.float32) / factor
    if granularity == "token":
        expected_scale = scale_for_max(reduced.abs().amax(-1, keepdim=True) * 0.9, fmt)
        assert torch.equal(operand_scale, expected_scale)
    codes = quantize(reduced, fmt, operand_scale)
    expected = dequantize(codes, fmt, torch.ones(())) * factor
    assert torch.equal(operand.to(torch.float32), expected)


def test_a_zero_row_has_scale_one():
    x = torch.zeros(2, 8)
    operand, scale = ops.quantize_activation(x, torch.ones(()), None, "e2m1", "token")
    assert torch.equal(scale, torch.ones(2, 1))
    assert not operand.any()


@pytest.mark.parametrize("fmt", of_width(4), ids=lambda fmt: fmt.name)
def test_embedding_returns_dequantized_rows(fmt):
    codes, scale = random_codes(11, 9, 4), torch.rand(11)
    rows = torch.tensor([[3, 0], [10, 3]])
    got = ops.embedding(rows, pack(codes, 4), scale, fmt.name, 9, torch.float32)
    assert torch.equal(got, dequantize(codes, fmt, scale[:, None])[rows])


def test_schemas_and_fake_kernels_hold():
    x, packed = torch.randn(2, 8), pack(random_codes(5, 8, 4), 4)
    shift = torch.zeros(8, dtype=torch.int8)
    one = torch.ones(())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fp4.quantize_activation.default,
        (x, one, shift, "e2m1", "token"),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.fp4.linear.default,
        (x, None, packed, torch.ones(5), torch.ones(5), "e2m1", torch.float32),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.fp4.linears.default,
        (x, None, [packed, packed], [torch.ones(5)] * 2, [], "e2m1", torch.float32, []),
        test_utils=checks,
    )
    order = torch.tensor([3, 1, 8, 0], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.fp4.quantize_activation.default,
        (x, one, None, "e2m1", "tensor", False, False, 1, 0, 1.0, order),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.fp4.embedding.default,
        (torch.tensor([1]), packed, torch.ones(5), "e2m1", 8, torch.float32),
        test_utils=checks,
    )
