"""Codes and integer values by arithmetic, as Inductor fuses it: a table would be a gather each."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4compile.formats import FloatFormat
from fp4compile.numerics import power_of_two


def decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """float32 integer values of ``codes``."""
    half = 2 ** (fmt.bits - 1)
    magnitude = codes.to(torch.int32) & (half - 1)
    exponent = magnitude >> fmt.mantissa_bits
    mantissa = magnitude & (2**fmt.mantissa_bits - 1)
    # In float32: integer values of E5M2 go beyond int32.
    normal = (mantissa + 2**fmt.mantissa_bits).to(torch.float32) * power_of_two(exponent - 1)
    value = torch.where(exponent == 0, mantissa.to(torch.float32), normal)
    value = value.clamp(max=float(fmt.max_integer))
    return torch.where(codes >= half, -value, value)


def encode(steps: Tensor, fmt: FloatFormat) -> Tensor:
    """uint8 codes of float32 ``steps``, as ``numerics.steps_to_code`` rounds them."""
    bound = float(fmt.max_integer)
    magnitude = torch.nan_to_num(steps.abs(), nan=0.0, posinf=bound).clamp(max=bound)
    # A normal value's code is its float's exponent and leading mantissa bits, less an even offset:
    # what rounds the float to even at that bit rounds to the even code.
    dropped = 23 - fmt.mantissa_bits
    bits = magnitude.view(torch.int32)
    rounded = bits + (2 ** (dropped - 1) - 1) + ((bits >> dropped) & 1)
    normal = (rounded >> dropped) - ((126 + fmt.mantissa_bits) << fmt.mantissa_bits)
    smallest_normal = 2.0**fmt.mantissa_bits
    small = magnitude.clamp(max=smallest_normal).round()  # halves to even as well
    code = torch.where(magnitude < smallest_normal, small.to(torch.int32), normal)
    sign = torch.signbit(steps).to(torch.int32) << (fmt.bits - 1)
    return (code | sign).to(torch.uint8)
