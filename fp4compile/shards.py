"""Parts of a quantized weight, for processes that share its products.

Rows (N) can be cut anywhere. A cut along K must not divide what belongs together: the codes of a
byte, the channels of a block scale, those of a Hadamard rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm

import torch
from torch import Tensor
from torch import distributed as dist

from fp4compile import ops
from fp4compile.errors import ShardingError
from fp4compile.formats import alternatives
from fp4compile.operand import transformed
from fp4compile.ops.quantize_activation import as_operand
from fp4compile.packing import codes_per_group, packed_size
from fp4compile.tensor import FP4Tensor


def rows(weight: FP4Tensor, ranges: Sequence[tuple[int, int]]) -> FP4Tensor:
    """The outputs ``[start, stop)`` of all ``ranges``, behind each other, as a weight."""

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim)

    parts: dict[str, Tensor] = {"packed_weight": cut(weight.packed_weight, -2)}
    if weight.block_scale is not None:
        parts["block_scale"] = cut(weight.block_scale, -2)
    else:
        parts["weight_scale"] = cut(weight.weight_scale, -1)
    return _part_of(weight, parts, weight.reduction)


def columns(weight: FP4Tensor, start: int, stop: int) -> FP4Tensor:
    """The input channels ``[start, stop)`` of ``weight``: it takes ``x[..., start:stop]``.

    Raises:
        ShardingError: the cut would divide a byte, a block or a rotation, or channels are not in
            their order.
    """
    if weight.channel_order is not None:
        raise ShardingError(
            "the channels of this weight are ordered by their exponent shifts, so a range of them "
            "is no range of its codes; divide the model before its channels are ordered"
        )
    multiple = channel_multiple(weight.weight_format, weight.block_size, weight.rotation)
    if start % multiple or (stop % multiple and stop != weight.reduction):
        raise ShardingError(
            f"channels {start} to {stop} of {weight.reduction} cannot be cut out: this weight's "
            f"codes, blocks and rotations need multiples of {multiple}; use fewer processes, or "
            "quantize with smaller blocks"
        )
    bits = alternatives(weight.weight_format)[0].bits
    first, last = packed_size(start, bits), packed_size(stop, bits)
    parts: dict[str, Tensor] = {"packed_weight": weight.packed_weight[..., first:last].clone()}
    if weight.block_scale is not None:
        size = weight.block_size
        parts["block_scale"] = weight.block_scale[..., start // size : -(-stop // size)].clone()
    if weight.exponent_shift is not None:
        parts["exponent_shift"] = weight.exponent_shift[start:stop].clone()
    return _part_of(weight, parts, stop - start)


def channel_multiple(weight_format: str, block_size: int, rotation: int) -> int:
    """Channels that a cut along K must leave together."""
    bits = alternatives(weight_format)[0].bits
    return lcm(codes_per_group(bits), block_size or 1, rotation)


def _part_of(weight: FP4Tensor, cut: dict[str, Tensor], reduction: int) -> FP4Tensor:
    # A scale that all parts share must not keep the file mapped that it was read from.
    shared = [name for name in weight.__tensor_flatten__()[0] if name not in cut]
    copies = {name: getattr(weight, name).clone() for name in shared}
    return weight.with_parts(copies | cut, reduction=reduction)


def summed_linear(
    x: Tensor, weight: FP4Tensor, bias: Tensor | None, all_reduce: Callable[[Tensor, str], None]
) -> Tensor:
    """``fp4::linear`` of the whole weight, by processes that each hold some of its columns.

    Without blocks and with an int8 operand every process's sums are integers; they are added before
    anything is scaled, so that all get the bits of one process (while the sums stay below 2^24,
    which float32 holds exactly). Other partial results are added in float32.

    Args:
        x: ``[..., K']``, the channels of this process.
        bias: the whole one, or None.
        all_reduce: reduces its first argument in place over all processes, by ``"sum"`` or
            ``"max"``.
    """
    operand, operand_scale = _operand(x, weight, all_reduce)
    exact = weight.block_scale is None and operand.dtype == torch.int8
    ones = torch.ones_like(weight.weight_scale)
    y = ops.linear(
        operand,
        operand.new_ones((), dtype=torch.float32) if exact else operand_scale,
        weight.packed_weight,
        ones if exact else weight.weight_scale,
        None,
        weight.weight_format,
        torch.float32,
        weight.block_scale,
        weight.block_size,
    )
    all_reduce(y, "sum")
    if exact:
        assert operand_scale is not None
        y = y * operand_scale * weight.weight_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(x.dtype)


def _operand(
    x: Tensor, weight: FP4Tensor, all_reduce: Callable[[Tensor, str], None]
) -> tuple[Tensor, Tensor | None]:
    """``weight.operand_of(x)``; a token's maximum is that over the channels of all processes."""
    if weight.activation_format is None or weight.granularity != "token":
        return weight.operand_of(x)
    assert weight.activation_scale is not None
    values = transformed(x, weight.exponent_shift, weight.rotation, weight.shift_folded)
    maximum = values.abs().amax(dim=-1, keepdim=True)
    all_reduce(maximum, "max")
    return as_operand(
        values,
        weight.activation_scale,
        weight.exponent_shift,
        weight.activation_format,
        weight.granularity,
        weight.shift_in_weight,
        token_maximum=maximum,
    )


def gathered_linear(
    x: Tensor, weight: FP4Tensor, bias: Tensor | None, all_gather: Callable[[Tensor], Tensor]
) -> Tensor:
    """``fp4::linear`` by processes that each have some channels of the input and some rows of the
    weight: for weights that cannot be cut along K. The bits are those of one process.

    Args:
        x: ``[..., K']``, the channels of this process.
        bias: of the rows of this process, or None.
        all_gather: concatenates the last dimension over all processes.
    """
    return all_gather(weight.linear(all_gather(x), bias))


def looked_up(
    indices: Tensor, weight: FP4Tensor, start: int, all_reduce: Callable[[Tensor, str], None]
) -> Tensor:
    """Rows of an embedding of which this process holds those from ``start`` on."""
    own = indices - start
    held = (own >= 0) & (own < weight.shape[0])
    found = weight.lookup(own.clamp(0, weight.shape[0] - 1))
    found = torch.where(held.unsqueeze(-1), found, torch.zeros_like(found))
    all_reduce(found, "sum")  # one process has each row, so nothing is rounded
    return found


def all_reduce_over(group: dist.ProcessGroup) -> Callable[[Tensor, str], None]:
    """In-place reduction over ``group``."""
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

    def all_reduce(tensor: Tensor, operation: str) -> None:
        dist.all_reduce(tensor, operations[operation], group)

    return all_reduce


def all_gather_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Concatenation of equal parts along the last dimension over ``group``."""

    def all_gather(tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group)
        return torch.cat(parts, dim=-1)

    return all_gather
