"""FP4 weights of other programs' checkpoints, as ours: codes and block scales bit for bit.

NVFP4 and MXFP4 hold E2M1 codes, low nibble first as ours, with a scale per block along K (see
``compressed_tensors.py``). What ours cannot hold exactly is refused; weights of bitsandbytes are
then kept in high precision, since hardly any of its checkpoints has only others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4compile.errors import InterchangeError
from fp4compile.integrations import bitsandbytes
from fp4compile.integrations.compressed_tensors import E8M0_BIAS, STEP
from fp4compile.tensor import FP4Tensor

# Exponents of the powers of two that E4M3 scales hold, subnormal ones too.
E4M3_EXPONENTS = (-9, 8)
E4M3_NAN, E8M0_NAN = 127, 255
MAGNITUDES = 0x77  # both codes of a byte without their signs


@dataclass(frozen=True)
class ForeignFormat:
    """``tensors``: pattern at the end of a tensor's name -> the part of a weight that it is;
    ``target``: what stands in a parameter's name instead. ``parts`` gives the arguments of an
    :class:`FP4Tensor` but for those that all formats share; ``transposed``: the parameter is
    ``[..., K, N]`` where the codes are ``[..., N, K / 2]``. ``plain`` gives what a weight means
    that ``parts`` refuses; without it, the checkpoint is refused.
    """

    tensors: Mapping[str, str]
    target: str
    block_size: int
    parts: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    transposed: bool = False
    plain: Callable[[Mapping[str, Tensor]], Tensor] | None = None


def foreign_weight(
    name: str, fmt: ForeignFormat, tensors: Mapping[str, Tensor], parameter: Tensor
) -> FP4Tensor:
    """The weight that takes the place of ``parameter``.

    Args:
        tensors: by part (the values of ``fmt.tensors``).

    Raises:
        InterchangeError: tensors are missing, or have scales that E4M3 block scales cannot hold.
    """
    try:
        parts = fmt.parts(tensors)
    except KeyError as error:
        raise InterchangeError(f"the checkpoint has no {error.args[0]} of {name}") from error
    except InterchangeError as error:
        raise InterchangeError(f"{name}: {error}") from error
    return FP4Tensor(
        **{"block_size": fmt.block_size, **parts},
        weight_format="e2m1",
        reduction=2 * parts["packed_weight"].shape[-1],
        transposed=fmt.transposed,
        dtype=parameter.dtype,
    )


def _nvfp4(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    codes = tensors["scale"].view(torch.uint8)
    if bool((codes >= E4M3_NAN).any()):
        raise InterchangeError("it has block scales that are negative or no numbers")
    activation: dict[str, Any] = {}
    if "input_global_scale" in tensors:
        activation = {
            "activation_scale": _outer(tensors["input_global_scale"]).reshape(()),
            "activation_format": "e2m1",
            "granularity": "block",
        }
    outer = _outer(tensors["global_scale"])
    packed = tensors["packed"].contiguous()
    return {"packed_weight": packed, "weight_scale": outer, "block_scale": codes, **activation}


def _outer(global_scale: Tensor) -> Tensor:
    return STEP / global_scale.to(torch.float32).reshape(1)


def _mxfp4(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    packed, exponents = tensors["packed"], tensors["scale"].view(torch.uint8)
    if packed.dim() > exponents.dim():  # [E, N, blocks, 16], the blocks of gpt-oss
        packed = packed.flatten(-2)
    codes, outer = e4m3_of_powers(packed, exponents)
    return {"packed_weight": packed.contiguous(), "weight_scale": outer, "block_scale": codes}


def e4m3_of_powers(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 block scale codes, outer scale) that mean the scales ``2^(exponents - 127)`` of OCP's
    E2M1.

    Args:
        packed: uint8 ``[N, K / 2]``, or ``[E, N, K / 2]`` with an outer scale per expert.
        exponents: uint8 ``[..., blocks]``, E8M0. That of a block of zeros does not matter.

    Raises:
        InterchangeError: a matrix has scales that lie further apart than E4M3 reaches.
    """
    if bool((exponents == E8M0_NAN).any()):
        raise InterchangeError("it has block scales that are no numbers")
    blocks = packed.unflatten(-1, (exponents.shape[-1], -1))
    used = ((blocks & MAGNITUDES) != 0).any(dim=-1)
    power = exponents.to(torch.int32) - E8M0_BIAS - 1  # of our step, which is one half
    least, most = E4M3_EXPONENTS
    top = torch.where(used, power, power.amin()).amax(dim=(-2, -1), keepdim=True)
    relative = power - top + most
    if bool((used & (relative < least)).any()):
        spread = int((top - torch.where(used, power, top)).amax())
        raise InterchangeError(
            f"its block scales reach over {spread} powers of two, E4M3 block scales over "
            f"{most - least}; load the checkpoint in full precision and quantize that"
        )
    ratio = torch.exp2(relative.clamp(least, most).to(torch.float32))
    outer = torch.exp2((top - most).to(torch.float32))
    codes = ratio.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, outer if packed.dim() == 3 else outer.reshape(1)


_COMPRESSED = {"weight_packed$": "packed", "weight_scale$": "scale"}
FOREIGN: dict[str, ForeignFormat] = {
    "nvfp4-pack-quantized": ForeignFormat(
        {
            **_COMPRESSED,
            "weight_global_scale$": "global_scale",
            "input_global_scale$": "input_global_scale",
        },
        "weight",
        16,
        _nvfp4,
    ),
    "mxfp4-pack-quantized": ForeignFormat(_COMPRESSED, "weight", 32, _mxfp4),
    # gpt-oss: experts.gate_up_proj_blocks, ..._scales
    "mxfp4": ForeignFormat(
        {"_blocks$": "packed", "_scales$": "scale"}, "", 32, _mxfp4, transposed=True
    ),
    "bitsandbytes-fp4": ForeignFormat(
        bitsandbytes.TENSORS, ".weight", 0, bitsandbytes.parts, plain=bitsandbytes.dequantized
    ),
}
REFUSED = {
    "bitsandbytes-nf4": "NF4's values are quantiles, not those of a floating-point format",
    "bitsandbytes-int8": "its weights are integers",
}


def format_of(quantization_config: Mapping[str, Any]) -> str:
    """Name in :data:`FOREIGN` of the format that ``quantization_config`` of a config.json names.

    Raises:
        InterchangeError: it is none of them, or has activations that ours cannot repeat.
    """
    method = quantization_config.get("quant_method")
    found = _name(quantization_config)
    if found not in FOREIGN:
        reason = REFUSED.get(str(found), "only these formats are read: " + ", ".join(FOREIGN))
        raise InterchangeError(
            f"the checkpoint is quantized by {method!r} in the format {found!r}: {reason}. Load it "
            "dequantized, or the full-precision model, and call fp4compile.quantize"
        )
    for group in quantization_config.get("config_groups", {}).values():
        _check_group(found, group)
    return found


def _name(config: Mapping[str, Any]) -> str:
    if config.get("quant_method") == "bitsandbytes":
        four_bits = config.get("bnb_4bit_quant_type", "fp4")
        return f"bitsandbytes-{four_bits if config.get('load_in_4bit') else 'int8'}"
    name = "format" if config.get("quant_method") == "compressed-tensors" else "quant_method"
    return str(config.get(name))


def _check_group(found: str, group: Mapping[str, Any]) -> None:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if not weights.get("symmetric", True):
        raise InterchangeError("its weights have zero points; FP4 weights here have none")
    if inputs is None:
        return
    kind = tuple(inputs.get(name) for name in ("num_bits", "type", "group_size", "dynamic"))
    if found != "nvfp4-pack-quantized" or kind != (4, "float", 16, "local"):
        raise InterchangeError(
            f"its activations are {kind[0]}-bit {kind[1]} in groups of {kind[2]}, dynamic "
            f"{kind[3]}; only those of NVFP4 (E2M1 in blocks of 16, a static global scale) are read"
        )
