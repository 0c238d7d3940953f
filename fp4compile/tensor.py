"""The quantized weight: a traceable tensor subclass that stands where the parameter stood.

``F.linear``, ``addmm``, ``matmul`` and ``F.embedding`` on it call the ``fp4::`` ops, so a model is
quantized by what it computes, not by the classes of its modules; eager calls, ``generate``,
``state_dict``, ``torch.compile`` and ``torch.export`` all see the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from fp4compile import ops
from fp4compile.errors import UnsupportedOperationError
from fp4compile.formats import by_name
from fp4compile.operand import SHIFT_BLOCK, original_weight, unordered
from fp4compile.packing import unpack_blocks, unpack_values
from fp4compile.weight_functions import FUNCTIONS, TRANSPOSES, PackedWeight, by_operator
from fp4compile.weight_uses import swaps_last_two

aten = torch.ops.aten


class FP4Tensor(PackedWeight):
    """Packed codes of a weight ``[N, K]`` with all that a call needs to use them.

    ``packed_weight`` uint8 ``[N, packed_size(K)]``; ``weight_scale`` and ``block_scale`` as
    ``fp4::linear`` takes them. ``activation_scale`` float32 0-d, ``exponent_shift`` int8 ``[K]``
    and the attributes from ``granularity`` to ``block_clip`` are those of
    ``fp4::quantize_activation``; ``activation_format`` None means weight-only. The logical shape
    is ``[N, K]``, or ``[K, N]`` when ``transposed`` (weights of addmm and matmul), or that of a
    convolution, ``[N, K / prod(patch), *patch]``; ``dtype`` is the one the parameter had.

    ``channel_order`` int32 ``[codes]``: the channel of every code of a row where they are not in
    order, K for those that pad; ``exponent_shift`` then has one per code, the same for
    ``SHIFT_BLOCK`` neighbours (``channel_order.py``).

    A stack of experts has a dimension more: ``packed_weight`` ``[E, N, packed_size(K)]``,
    ``weight_scale`` ``[E, N]`` (``[E, 1, 1]`` with blocks), ``block_scale`` ``[E, N, blocks]``, and
    the logical shape ``[E, N, K]`` or ``[E, K, N]``.
    """

    packed_weight: Tensor
    weight_scale: Tensor
    activation_scale: Tensor | None
    exponent_shift: Tensor | None
    block_scale: Tensor | None
    channel_order: Tensor | None
    weight_format: str
    activation_format: str | None
    granularity: str
    shift_folded: bool
    shift_in_weight: bool
    rotation: int
    block_size: int
    block_clip: float
    reduction: int
    transposed: bool
    patch: tuple[int, ...]

    TENSORS = (
        "packed_weight",
        "weight_scale",
        "activation_scale",
        "exponent_shift",
        "block_scale",
        "channel_order",
    )
    ATTRIBUTES = (
        "weight_format",
        "activation_format",
        "granularity",
        "shift_folded",
        "shift_in_weight",
        "rotation",
        "block_size",
        "block_clip",
        "reduction",
        "transposed",
        "patch",
    )

    @staticmethod
    def __new__(
        cls,
        packed_weight: Tensor,
        weight_scale: Tensor,
        activation_scale: Tensor | None = None,
        exponent_shift: Tensor | None = None,
        block_scale: Tensor | None = None,
        channel_order: Tensor | None = None,
        *,
        weight_format: str,
        activation_format: str | None = None,
        granularity: str = "tensor",
        shift_folded: bool = False,
        shift_in_weight: bool = False,
        rotation: int = 1,
        block_size: int = 0,
        block_clip: float = 1.0,
        reduction: int,
        transposed: bool = False,
        patch: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> FP4Tensor:
        *stack, rows = packed_weight.shape[:-1]
        shape = (*stack, reduction, rows) if transposed else (*stack, rows, reduction)
        if patch:
            shape = (rows, reduction // prod(patch), *patch)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed_weight.device, requires_grad=False
        )

    def __init__(
        self,
        packed_weight: Tensor,
        weight_scale: Tensor,
        activation_scale: Tensor | None = None,
        exponent_shift: Tensor | None = None,
        block_scale: Tensor | None = None,
        channel_order: Tensor | None = None,
        *,
        weight_format: str,
        activation_format: str | None = None,
        granularity: str = "tensor",
        shift_folded: bool = False,
        shift_in_weight: bool = False,
        rotation: int = 1,
        block_size: int = 0,
        block_clip: float = 1.0,
        reduction: int,
        transposed: bool = False,
        patch: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.packed_weight = packed_weight
        self.weight_scale = weight_scale
        self.activation_scale = activation_scale
        self.exponent_shift = exponent_shift
        self.block_scale = block_scale
        self.channel_order = channel_order
        self.weight_format = weight_format
        self.activation_format = activation_format
        self.granularity = granularity
        self.shift_folded = shift_folded
        self.shift_in_weight = shift_in_weight
        self.rotation = rotation
        self.block_size = block_size
        self.block_clip = block_clip
        self.reduction = reduction
        self.transposed = transposed
        self.patch = patch

    @property
    def operand_shift_block(self) -> int:
        """How many neighbours share an exponent shift in the operand; 0 where it has none."""
        if self.exponent_shift is None or self.shift_in_weight:
            return 0
        return 1 if self.channel_order is None else SHIFT_BLOCK

    @property
    def operand_facts(self) -> tuple[str, Tensor | None, Tensor | None, int]:
        """What ``fp4::linear`` and its like may know of the operand, from ``operand_format`` on."""
        return (
            self.activation_format or "",
            self.activation_scale if self.granularity == "block" else None,
            self.exponent_shift if self.operand_shift_block else None,
            self.operand_shift_block,
        )

    @property
    def codes(self) -> int:
        """Codes of a row: the channels, and what pads blocks of one exponent shift."""
        return self.reduction if self.channel_order is None else len(self.channel_order)

    @property
    def channel_shift(self) -> Tensor | None:
        """``exponent_shift`` in the order of the channels."""
        if self.exponent_shift is None or self.channel_order is None:
            return self.exponent_shift
        return unordered(self.exponent_shift, self.channel_order, self.reduction)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and shifts."""
        return sum(getattr(self, name).nbytes for name in self.__tensor_flatten__()[0])

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        present = [name for name in self.TENSORS if getattr(self, name) is not None]
        return present, self._attributes()

    def _attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.ATTRIBUTES} | {"dtype": self.dtype}

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: dict[str, Any], attributes: dict[str, Any], _size: Any, _stride: Any
    ) -> FP4Tensor:
        return cls(**tensors, **attributes)

    def _stable_hash_for_caching(self) -> str:
        # Key of AOTAutograd's on-disk cache: everything a graph may specialise on.
        tensors = [(name, getattr(self, name).shape) for name in self.__tensor_flatten__()[0]]
        return f"{type(self).__qualname__}{tensors}{sorted(self._attributes().items())}"

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # the stub's name is garbled
        activation = self.activation_format or "16-bit"
        return (
            f"FP4Tensor(shape={tuple(self.shape)}, weight={self.weight_format}, "
            f"activation={activation} per {self.granularity}, device={self.device})"
        )

    def with_parts(self, tensors: Mapping[str, Tensor], **attributes: Any) -> FP4Tensor:
        """The same weight with some ``tensors`` and attributes replaced."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.TENSORS}
        return type(self)(**(parts | dict(tensors)), **(self._attributes() | attributes))

    def with_attributes(self, **changes: Any) -> FP4Tensor:
        """The same tensors with some attributes replaced."""
        return self.with_parts({}, **changes)

    def map_tensors(self, function: Callable[[Tensor], Tensor], **changes: Any) -> FP4Tensor:
        """``function`` applied to every inner tensor."""
        names = self.__tensor_flatten__()[0]
        return self.with_parts({name: function(getattr(self, name)) for name in names}, **changes)

    def dequantize(self) -> Tensor:
        """The weight that the codes mean, float32, in the logical shape."""
        if self.block_scale is None:
            values = unpack_values(self.packed_weight, by_name(self.weight_format), self.codes)
            if self.channel_order is not None:
                values = unordered(values, self.channel_order, self.reduction)
            weight = values * self.weight_scale.unsqueeze(-1)
        else:
            weight = unpack_blocks(
                self.packed_weight,
                self.block_scale,
                self.weight_scale,
                self.weight_format,
                self.block_size,
                self.reduction,
            )
        weight = original_weight(weight, self.exponent_shift, self.shift_in_weight, self.rotation)
        if self.patch:
            return weight.view(self.shape)
        return weight.mT if self.transposed else weight

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ W^T + bias`` for ``x`` ``[..., K]``, through the fp4:: ops."""
        operand, operand_scale = self.operand_of(x)
        return ops.linear(
            operand,
            operand_scale,
            self.packed_weight,
            self.weight_scale,
            bias,
            self.weight_format,
            x.dtype,
            self.block_scale,
            self.block_size,
            *self.operand_facts,
        )

    def grouped_linear(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows of ``x`` ``[S, K]`` up to ``offsets[e]`` times ``W[e]^T`` of a stack of experts."""
        operand, operand_scale = self.operand_of(x)
        return ops.grouped_linear(
            operand,
            operand_scale,
            self.packed_weight,
            self.weight_scale,
            offsets,
            self.weight_format,
            x.dtype,
            self.block_scale,
            self.block_size,
            *self.operand_facts,
        )

    def operand_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` ``[..., K]`` as the GEMM takes it, and its scale."""
        operand, operand_scale = x, None
        if self.activation_format is not None:
            assert self.activation_scale is not None
            operand, operand_scale = ops.quantize_activation(
                x,
                self.activation_scale,
                self.exponent_shift,
                self.activation_format,
                self.granularity,
                self.shift_folded,
                self.shift_in_weight,
                self.rotation,
                self.block_size,
                self.block_clip,
                self.channel_order,
            )
        return operand, operand_scale

    def lookup(self, indices: Tensor) -> Tensor:
        """Rows of the weight, in its dtype."""
        rows = ops.embedding(
            indices,
            self.packed_weight,
            self.weight_scale,
            self.weight_format,
            self.codes,
            self.dtype,
            self.block_scale,
            self.block_size,
            self.exponent_shift if self.shift_in_weight else None,
            self.rotation,
        )
        if self.channel_order is None:
            return rows
        return unordered(rows, self.channel_order, self.reduction)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = FUNCTIONS.get(func) or by_operator(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    # torch's stub does not know that this is a class method.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ELEMENTWISE:
            out = args[0].map_tensors(lambda tensor: func(tensor, *args[1:], **kwargs))
            return return_and_correct_aliasing(func, args, kwargs, out)
        if func is aten._to_copy.default:
            return _to_copy(*args, **kwargs)
        if func in TRANSPOSES and swaps_last_two(args[0].dim(), *args[1:]):
            out = args[0].with_attributes(transposed=not args[0].transposed)
            return return_and_correct_aliasing(func, args, kwargs, out)
        if func in (aten.index.Tensor, aten.index_select.default, aten.select.int):
            return _of_stack(func, *args, **kwargs)
        if func in _ROWS:
            out = _rows_of(func, *args, **kwargs)
            return return_and_correct_aliasing(func, args, kwargs, out)
        if func is aten.copy_.default:
            return _copy(*args, **kwargs)
        handler = by_operator(func)
        if handler is not None:
            return handler(*args, **kwargs)
        raise UnsupportedOperationError(
            f"{func} is not defined for a quantized weight of shape {tuple(args[0].shape)}; "
            "call .dequantize() on it, or leave this parameter out with ignore=[...]"
        )


_ELEMENTWISE = frozenset({aten.detach.default, aten.clone.default, aten.alias.default})
_ROWS = frozenset({aten.split_with_sizes.default, aten.split.Tensor, aten.slice.Tensor})


def _to_copy(self: FP4Tensor, *, dtype: torch.dtype | None = None, **kwargs: Any) -> FP4Tensor:
    # The dtype is the logical one; codes and scales keep theirs.
    kwargs.pop("memory_format", None)
    return self.map_tensors(
        lambda tensor: aten._to_copy.default(tensor, **kwargs), dtype=dtype or self.dtype
    )


def _of_stack(func: Any, self: FP4Tensor, *index: Any, **kwargs: Any) -> FP4Tensor:
    """Some matrices of a stack of experts, or one."""
    along_first = index[0] == 0 if func is not aten.index.Tensor else len(index[0]) == 1
    if self.dim() != 3 or not along_first:
        raise UnsupportedOperationError(
            f"{func} with {index} is not defined for a quantized weight of shape "
            f"{tuple(self.shape)}: only matrices of a stack can be taken; leave this parameter "
            "out with ignore=[...]"
        )
    names = ("packed_weight", "weight_scale", "block_scale")
    held = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
    parts = {name: func(tensor, *index, **kwargs) for name, tensor in held.items()}
    if parts["weight_scale"].dim() == 2 and self.block_scale is not None:
        parts["weight_scale"] = parts["weight_scale"].flatten()
    return self.with_parts(parts)


def _rows_of(func: Any, self: FP4Tensor, *args: Any, **kwargs: Any) -> Any:
    """Some rows of a weight, or all of them in parts."""
    position = 0 if func is aten.slice.Tensor else 1
    dim = kwargs.get("dim", args[position] if len(args) > position else 0)
    if self.dim() != 2 or self.transposed or self.patch or dim != 0:
        raise UnsupportedOperationError(
            f"{func} along dimension {dim} is not defined for a quantized weight of shape "
            f"{tuple(self.shape)}: only rows of [N, K] can be taken; leave this parameter out "
            "with ignore=[...]"
        )
    by_row = ("packed_weight", "block_scale" if self.block_scale is not None else "weight_scale")
    found = [func(getattr(self, name), *args, **kwargs) for name in by_row]
    if isinstance(found[0], Tensor):
        return self.with_parts(dict(zip(by_row, found, strict=True)))
    rows = zip(*found, strict=True)
    return [self.with_parts(dict(zip(by_row, parts, strict=True))) for parts in rows]


def _copy(self: FP4Tensor, source: Tensor, non_blocking: bool = False) -> FP4Tensor:
    if (
        not isinstance(source, FP4Tensor)
        or source.__tensor_flatten__() != self.__tensor_flatten__()
    ):
        raise UnsupportedOperationError(
            f"cannot copy {source!r} into {self!r}; quantized weights are copied only between "
            "tensors of the same format, granularity and shape"
        )
    for name in self.__tensor_flatten__()[0]:
        getattr(self, name).copy_(getattr(source, name), non_blocking)
    return self


torch.serialization.add_safe_globals([FP4Tensor])
