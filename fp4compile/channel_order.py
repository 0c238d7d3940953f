"""Exponent shifts as scales of blocks: channels of one shift become neighbours.

Hardware that multiplies 4-bit floats takes a power of two per block of 32 channels. LLM-FP4's
exponent bias is one per channel; with the channels sorted by it, and those of each value padded to
whole blocks by zeros, it is such a power, and nothing is rounded anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp4compile.errors import UnsupportedOperationError
from fp4compile.formats import by_name
from fp4compile.operand import SHIFT_BLOCK, ordered
from fp4compile.packing import pack, unpack
from fp4compile.tensor import FP4Tensor

NATIVE_FORMAT = "e2m1"


def channel_order(exponent_shift: Tensor) -> Tensor:
    """int32 ``[codes]``: the channels by ascending shift, each shift's padded with K to a multiple
    of :data:`SHIFT_BLOCK`.

    Args:
        exponent_shift: int8 ``[K]``.
    """
    padding = len(exponent_shift)
    parts = []
    for shift in exponent_shift.unique(sorted=True):
        channels = (exponent_shift == shift).nonzero().flatten()
        parts.append(nn.functional.pad(channels, (0, -len(channels) % SHIFT_BLOCK), value=padding))
    return torch.cat(parts).to(torch.int32)


def in_order(weight: FP4Tensor, order: Tensor) -> FP4Tensor:
    """``weight`` with its codes in the order ``order``; the same function bit for bit.

    Raises:
        UnsupportedOperationError: it needs no other order, see :func:`reason_against`.
    """
    reason = reason_against(weight)
    if reason is not None or weight.exponent_shift is None:
        raise UnsupportedOperationError(f"{weight!r} keeps the order of its channels: {reason}")
    bits = by_name(weight.weight_format).bits
    codes = ordered(unpack(weight.packed_weight, bits, weight.reduction), order)
    blocks = order.view(-1, SHIFT_BLOCK)[:, 0]  # padding never begins one
    shift = weight.exponent_shift[blocks].repeat_interleave(SHIFT_BLOCK)
    parts = {
        "packed_weight": pack(codes, bits),
        "exponent_shift": shift,
        "channel_order": order,
    }
    return weight.with_parts(parts)


def reason_against(weight: FP4Tensor) -> str | None:
    """Why the channels of ``weight`` stay in their order, or None."""
    if weight.channel_order is not None:
        return "they are sorted already"
    if not weight.operand_shift_block:
        return "its operand has no exponent shifts"
    if weight.packed_weight.dim() == 3:
        return "it is a stack of experts"
    if weight.block_size:
        return "it has block scales"
    for format in (weight.weight_format, weight.activation_format):
        if format != NATIVE_FORMAT:
            return f"{format} is not the format of the hardware, {NATIVE_FORMAT}"
    return None


def order_channels(model: nn.Module) -> dict[str, str]:
    """Sort the channels of every FP4 weight, in place, so that GPUs with 4-bit tensor cores
    multiply its exponent shifts themselves.

    What the model computes stays the same bit for bit; codes grow by less than
    ``4 * SHIFT_BLOCK`` per row. ``compile_model`` calls this where the GPU has such cores.

    Returns:
        Why weights stay as they are, by name.
    """
    made: dict[int, nn.Parameter] = {}
    kept: dict[str, str] = {}
    places: list[tuple[nn.Module, str, int]] = []
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not isinstance(weight, FP4Tensor):
            continue
        reason = reason_against(weight)
        if reason is not None or weight.exponent_shift is None:
            kept[name] = reason or ""
            continue
        if id(weight) not in made:
            sorted_weight = in_order(weight, channel_order(weight.exponent_shift))
            made[id(weight)] = nn.Parameter(sorted_weight, requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        places.append((model.get_submodule(owner), attribute, id(weight)))
    for module, attribute, identity in places:
        setattr(module, attribute, made[identity])
    return kept
