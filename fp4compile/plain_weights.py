"""Back from FP4 weights to plain ones, with the values that the codes mean."""

from __future__ import annotations

from torch import Tensor, nn

from fp4compile.numerics import power_of_two
from fp4compile.tensor import FP4Tensor


def use_plain_weights(model: nn.Module) -> nn.Module:
    """Replace every FP4 weight of ``model`` by a float32 parameter; activations stay unrounded.

    Where 2^-shift was folded into what produces an activation, the operand's shift took it back;
    now the weight does. What is looked up is no factor of an activation, so an embedding parts from
    a head that was tied to it if the head's input is shifted.
    """
    made: dict[tuple[int, bool], nn.Parameter] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if not isinstance(weight, FP4Tensor):
            continue
        owner_name, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        shifted = has_folded_shift(weight) and not isinstance(owner, nn.Embedding)
        if (id(weight), shifted) not in made:
            values = _values(weight, shifted)
            made[id(weight), shifted] = nn.Parameter(values, requires_grad=False)
        setattr(owner, attribute, made[id(weight), shifted])
    return model


def has_folded_shift(weight: FP4Tensor) -> bool:
    """Whether ``weight`` meets an activation that comes as ``x * 2^-shift``."""
    return weight.shift_folded and weight.exponent_shift is not None


def _values(weight: FP4Tensor, shifted: bool) -> Tensor:
    values = weight.dequantize()
    if not shifted or weight.channel_shift is None:
        return values
    factor = power_of_two(weight.channel_shift)
    return values * (factor[:, None] if weight.transposed else factor)
