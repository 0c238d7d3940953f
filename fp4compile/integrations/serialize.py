"""FP4 weights as plain named tensors and one JSON value, and back.

A weight ``name`` is stored as ``name.packed_weight``, ``name.weight_scale``, ...; what is no tensor
goes into the config, once per group of weights that agree in it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile.errors import CheckpointError
from fp4compile.formats import alternatives
from fp4compile.packing import packed_size
from fp4compile.tensor import FP4Tensor


def fp4_parameters(model: nn.Module) -> dict[str, FP4Tensor]:
    """Every FP4 weight under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in named if isinstance(weight, FP4Tensor)}


def attribute_groups(weights: Mapping[str, FP4Tensor]) -> list[dict[str, Any]]:
    """The attributes of all weights: one dict per distinct set, with the names under "weights"."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        values = tuple(getattr(weight, part) for part in FP4Tensor.ATTRIBUTES)
        groups.setdefault(values, []).append(name)
    return [
        {**dict(zip(FP4Tensor.ATTRIBUTES, values, strict=True)), "weights": members}
        for values, members in groups.items()
    ]


def attributes_by_name(groups: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The inverse of :func:`attribute_groups`, also after JSON, which has no tuples."""
    return {
        name: {
            part: tuple(value) if isinstance(value, list) else value
            for part, value in group.items()
            if part != "weights"
        }
        for group in groups
        for name in group["weights"]
    }


def flattened(state: Mapping[str, Tensor], aliases: Collection[str] = ()) -> dict[str, Tensor]:
    """``state`` with every FP4 weight replaced by its parts; ``aliases`` of tied weights left out.

    Parts that several weights share (the scale of one activation) are copied: safetensors stores
    no tensor twice.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, FP4Tensor):
            plain[name] = value
            continue
        if name in aliases:
            continue
        for part in value.__tensor_flatten__()[0]:
            tensor = getattr(value, part)
            plain[f"{name}.{part}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
    return plain


def tied_aliases(weights: Mapping[str, FP4Tensor], tied: Collection[str]) -> set[str]:
    """Names in ``tied`` whose weight also goes by a name that is not."""
    kept = {id(weight) for name, weight in weights.items() if name not in tied}
    return {name for name, weight in weights.items() if name in tied and id(weight) in kept}


def restored(
    name: str,
    parts: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    dtype: torch.dtype,
) -> FP4Tensor:
    """The weight ``name`` from its parts; ``dtype`` is that of the parameter it replaces.

    Raises:
        CheckpointError: parts are missing, or the codes are not as many as the format needs.
    """
    needed = {"packed_weight", "weight_scale"} | (
        {"activation_scale"} if attributes["activation_format"] else set()
    )
    missing = sorted(needed - set(parts))
    if missing:
        raise CheckpointError(f"the checkpoint has no {', '.join(missing)} of the weight {name}")
    tensors: dict[str, Any] = dict(parts)
    weight = FP4Tensor(**tensors, **attributes, dtype=dtype)
    _checked_bytes(name, weight)
    return weight


def check_shape(name: str, weight: Tensor, shape: Sequence[int]) -> None:
    """Whether ``weight`` has the ``shape`` of the parameter that it replaces.

    Raises:
        CheckpointError: it has not.
    """
    if weight.shape != torch.Size(shape):
        raise CheckpointError(
            f"{name} has the shape {tuple(weight.shape)} in the checkpoint, {tuple(shape)} in the "
            "model; the checkpoint belongs to another model"
        )


def bits_per_parameter(model: nn.Module) -> float:
    """Bits that ``model``'s parameters take in a file, per parameter; tied ones count once.

    Raises:
        CheckpointError: an FP4 weight takes other bytes than its format says.
    """
    total, count = 0, 0
    for name, parameter in model.named_parameters():
        count += parameter.numel()
        if isinstance(parameter, FP4Tensor):
            total += _checked_bytes(name, parameter)
        else:
            total += parameter.nbytes
    return 8 * total / max(count, 1)


def _checked_bytes(name: str, weight: FP4Tensor) -> int:
    bits = alternatives(weight.weight_format)[0].bits
    codes = weight.packed_weight.shape[:-1].numel() * packed_size(weight.codes, bits)
    if weight.packed_weight.nbytes != codes:
        raise CheckpointError(
            f"the codes of {name} take {weight.packed_weight.nbytes} bytes, {weight.weight_format} "
            f"needs {codes}; it was changed after quantization, or the file is damaged"
        )
    return weight.stored_bytes
