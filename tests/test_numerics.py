"""Laws of rounding, for every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FOREIGN

from fp4compile.formats import FORMATS, by_name
from fp4compile.numerics import (
    decode,
    dequantize,
    fake_quantize,
    power_of_two,
    quantize,
    round_steps,
    scale_for_max,
    steps_to_code,
)

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def interesting_steps(fmt) -> torch.Tensor:
    """Grid points, midpoints and their float32 neighbours, beyond the maximum, both signs."""
    grid = torch.tensor(fmt.magnitudes, dtype=torch.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    points = torch.cat((grid, middle, torch.randn(2000) * fmt.max_integer / 3))
    near = [
        points,
        points.nextafter(torch.tensor(torch.inf)),
        points.nextafter(-torch.tensor(torch.inf)),
    ]
    extreme = torch.tensor([0.0, fmt.max_integer * 5.0, torch.inf, 1e-40])
    found = torch.cat((*near, extreme))
    return torch.cat((found, -found))


@ALL
def test_the_two_roundings_agree(fmt):
    steps = interesting_steps(fmt)
    assert torch.equal(round_steps(steps, fmt), decode(steps_to_code(steps, fmt), fmt))


@ALL
def test_rounding_is_to_the_nearest_with_ties_to_the_even_code(fmt):
    steps = interesting_steps(fmt).to(torch.float64)
    steps = steps[steps.abs() <= fmt.max_integer]
    grid = torch.tensor(fmt.magnitudes, dtype=torch.float64)
    distance = (steps.abs()[:, None] - grid).abs()
    nearest = distance == distance.min(dim=1, keepdim=True).values
    # (is not the nearest, is odd): the smallest pair wins, hence the even code of a tie.
    rank = (~nearest).to(torch.int64) * 2 + torch.arange(len(grid)) % 2
    code = steps_to_code(steps.to(torch.float32), fmt).to(torch.int64) % 2 ** (fmt.bits - 1)
    assert torch.equal(code, rank.argmin(dim=1))


@ALL
def test_every_code_survives(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    half = 2 ** (fmt.bits - 1)
    codes = codes[codes % half < half - fmt.reserved_codes]
    codes = codes[codes != half]  # minus zero reads as zero, like the integer that it is
    scale = torch.tensor(0.37)
    again = quantize(dequantize(codes, fmt, scale), fmt, scale)
    assert torch.equal(again, codes)


@ALL
def test_rounding_is_idempotent_odd_and_monotone(fmt):
    steps = interesting_steps(fmt).sort().values
    once = round_steps(steps, fmt)
    assert torch.equal(round_steps(once, fmt), once)
    assert torch.equal(round_steps(-steps, fmt), -once)
    assert bool((once.diff() >= 0).all())


@ALL
def test_saturates_and_never_yields_nan(fmt):
    steps = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38])
    expected = torch.tensor([fmt.max_integer, -fmt.max_integer, 0, fmt.max_integer])
    assert torch.equal(round_steps(steps, fmt), expected.to(torch.float32))


@pytest.mark.parametrize("name", FOREIGN)
def test_codes_match_ml_dtypes_in_range(name):
    fmt = by_name(name)
    steps = interesting_steps(fmt)
    steps = steps[steps.abs() <= fmt.max_integer]
    values = (steps.to(torch.float64) * fmt.default_step).numpy()
    theirs = values.astype(FOREIGN[name]).view(np.uint8)
    np.testing.assert_array_equal(steps_to_code(steps, fmt).numpy(), theirs)


@ALL
@given(exponent=st.integers(-60, 60))
def test_quantization_is_invariant_to_powers_of_two(fmt, exponent):
    x = torch.linspace(-3, 3, 101)
    scale, factor = torch.tensor(0.11), 2.0**exponent
    assert torch.equal(
        fake_quantize(x * factor, fmt, scale * factor), fake_quantize(x, fmt, scale) * factor
    )


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]


@ALL
def test_the_maximum_is_representable_and_zero_has_scale_one(fmt):
    maxima = torch.tensor([0.0, 1e-3, 7.0, 1e30])
    scale = scale_for_max(maxima, fmt)
    assert scale[0] == 1
    got = fake_quantize(maxima, fmt, scale)
    torch.testing.assert_close(got, maxima, rtol=1e-6, atol=0)
