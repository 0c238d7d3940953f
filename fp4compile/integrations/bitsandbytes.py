"""FP4 weights of bitsandbytes (``Linear4bit``, ``quant_type="fp4"``), as ours where that is exact.

A matrix ``[N, K]`` is one row of codes there, the high nibble first, cut into blocks that may go
over the ends of rows; each has a float32 maximum, or an 8-bit one ("nested") for many of which
there is another. Magnitudes are those of E2M1 but for the smallest, which is 1/192 of the maximum
where E2M1 has 1/12.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fp4compile.blocks import E4M3_MIN
from fp4compile.errors import InterchangeError
from fp4compile.formats import by_name
from fp4compile.packing import pack
from fp4compile.qparams import BLOCK_SIZES

# In a checkpoint: pattern at the end of a tensor's name -> what it is here. A plain weight has the
# name that codes have.
TENSORS = {
    r"\.weight$": "packed",
    r"\.weight\.absmax$": "absmax",
    r"\.weight\.quant_map$": "quant_map",
    r"\.weight\.nested_absmax$": "nested_absmax",
    r"\.weight\.nested_quant_map$": "nested_quant_map",
    r"\.weight\.quant_state\.bitsandbytes__fp4$": "state",
}
# Twelfths of a block's maximum by code without its sign; no E2M1 code means the second.
TWELFTHS = (0.0, 1 / 16, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
SMALLEST, SIGN = 1, 8
# Largest E4M3 scale with each of its eight significands.
TOPS = (256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0, 240.0)
ONE_ROUNDING = 2.0**-22


@dataclass(frozen=True)
class Stored:
    """One weight: ``codes`` of theirs ``[N, K]``; ``values``, what the 16 codes mean where the
    ``maxima`` of ``block_size`` neighbours are 1.
    """

    codes: Tensor
    values: Tensor
    maxima: Tensor
    block_size: int

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Stored:
        """From the tensors of a checkpoint, by the names in :data:`TENSORS`.

        Raises:
            InterchangeError: its table of values is another one.
            KeyError: one is not there.
        """
        about = json.loads(bytes(tensors["state"].tolist()))
        N, K = about["shape"]
        values = tensors["quant_map"].to(torch.float32)
        twelfths = torch.tensor(TWELFTHS)
        if not torch.allclose(12 * values, torch.cat((twelfths, -twelfths)), rtol=1e-6, atol=0):
            raise InterchangeError("its quant_map is not that of bitsandbytes' FP4")
        packed = tensors["packed"].contiguous().view(torch.uint8).flatten()
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: N * K]
        return Stored(codes.view(N, K), values, _maxima(tensors, about), about["blocksize"])

    @cached_property
    def maximum(self) -> Tensor:
        """float32 ``[N, K]``: of the block that each code is in."""
        spread = self.maxima.repeat_interleave(self.block_size)[: self.codes.numel()]
        return spread.view_as(self.codes)

    @cached_property
    def used(self) -> Tensor:
        """Where a scale matters: codes that are not zero, in blocks that are not."""
        return ((self.codes & ~SIGN) != 0) & (self.maximum != 0)


def _maxima(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    absmax = tensors["absmax"]
    if "nested_offset" not in about:
        return absmax.to(torch.float32)
    outer = tensors["nested_absmax"].repeat_interleave(about["nested_blocksize"])[: len(absmax)]
    inner = tensors["nested_quant_map"][absmax.long()]
    return (inner * outer + about["nested_offset"]).to(torch.float32)


def dequantized(tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 ``[N, K]``: what bitsandbytes says the weight is."""
    stored = Stored.of(tensors)
    return stored.values[stored.codes.long()] * stored.maximum


def parts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the FP4 weight that means the same, to one float32 rounding.

    Raises:
        InterchangeError: there is none.
    """
    stored = Stored.of(tensors)
    smallest = stored.used & ((stored.codes & ~SIGN) == SMALLEST)
    if bool(smallest.any()):
        share = float(smallest.float().mean())
        raise InterchangeError(
            f"{share:.1%} of its codes mean 1/192 of their block's maximum, which is no E2M1 value"
        )
    scales = _per_row(stored) or _per_block(stored)
    if scales is None:
        raise InterchangeError(
            f"the scales of its blocks of {stored.block_size} are neither the same all along a row "
            "nor E4M3 multiples of one number"
        )
    return {"packed_weight": _repacked(stored), **scales}


def _repacked(stored: Stored) -> Tensor:
    magnitudes = by_name("e2m1").magnitudes
    ours = torch.tensor([magnitudes.index(int(twelfths)) for twelfths in TWELFTHS])
    codes = torch.where(stored.used, ours[(stored.codes & ~SIGN).long()], 0)
    return pack((codes + (stored.codes & SIGN)).to(torch.uint8), 4)


def _per_row(stored: Stored) -> dict[str, Any] | None:
    largest = torch.where(stored.used, stored.maximum, 0).amax(dim=1, keepdim=True)
    if bool((stored.used & (stored.maximum != largest)).any()):
        return None
    return {"weight_scale": torch.where(largest > 0, largest / 12, 1.0).flatten()}


def _per_block(stored: Stored) -> dict[str, Any] | None:
    K = stored.codes.shape[1]
    sizes = [size for size in BLOCK_SIZES if K % size == 0 and stored.block_size % size == 0]
    if not sizes:
        return None
    blocks = (-1, max(sizes))
    used = stored.used.unflatten(1, blocks).any(dim=-1)
    scale = stored.maximum.unflatten(1, blocks)[..., 0] / 12
    for top in TOPS:
        outer = scale[used].max() / top
        e4m3 = (scale / outer).clamp(max=top).to(torch.float8_e4m3fn)
        off = (e4m3.to(torch.float32) * outer - scale).abs()
        if bool((off <= ONE_ROUNDING * scale)[used].all()):
            least = torch.full_like(scale, E4M3_MIN).to(torch.float8_e4m3fn)
            codes = torch.where(used, e4m3.view(torch.uint8), least.view(torch.uint8))
            scales = {"weight_scale": outer.reshape(1), "block_scale": codes}
            return {**scales, "block_size": max(sizes)}
    return None
