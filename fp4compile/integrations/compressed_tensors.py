"""Export to the checkpoints of compressed-tensors, which vLLM and SGLang load.

Both formats hold E2M1 codes, low nibble first as ours, with a scale per block along K:
``nvfp4-pack-quantized`` an E4M3 scale per 16 divided by a float32 global scale,
``mxfp4-pack-quantized`` a power of two per 32 (E8M0).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fp4compile.blocks import SECOND_FORMAT, block_scales
from fp4compile.errors import InterchangeError
from fp4compile.integrations.serialize import fp4_parameters, tied_aliases
from fp4compile.tensor import FP4Tensor

# Our E2M1 counts in steps of one half, theirs in ones.
STEP = 0.5
E8M0_BIAS = 127


@dataclass(frozen=True)
class PackedFormat:
    """``scales`` gives the tensors beside the codes; ``scale_dtype`` is its name in the config."""

    name: str
    block_size: int
    strategy: str
    scale_dtype: str
    scales: Callable[[str, FP4Tensor], dict[str, Tensor]]


def _nvfp4_scales(name: str, weight: FP4Tensor) -> dict[str, Tensor]:
    assert weight.block_scale is not None
    scales = {
        "weight_scale": weight.block_scale.view(torch.float8_e4m3fn),
        "weight_global_scale": _global_scale(weight.weight_scale),
    }
    if weight.activation_scale is not None:
        scales["input_global_scale"] = _global_scale(weight.activation_scale)
    return scales


def _global_scale(outer: Tensor) -> Tensor:
    return (outer.reshape(1) / STEP).reciprocal()


def _mxfp4_scales(name: str, weight: FP4Tensor) -> dict[str, Tensor]:
    assert weight.block_scale is not None
    mantissa, exponent = torch.frexp(block_scales(weight.block_scale, weight.weight_scale) / STEP)
    if bool((mantissa != 0.5).any()):
        raise InterchangeError(
            f"{name} has block scales that are no powers of two; export it as nvfp4-pack-quantized "
            "with blocks of 16"
        )
    return {"weight_scale": (exponent - 1 + E8M0_BIAS).to(torch.uint8)}


FORMATS = {
    fmt.name: fmt
    for fmt in (
        PackedFormat("nvfp4-pack-quantized", 16, "tensor_group", "float8_e4m3fn", _nvfp4_scales),
        PackedFormat("mxfp4-pack-quantized", 32, "group", "uint8", _mxfp4_scales),
    )
}


def export_compressed_tensors(
    model: Any, directory: str | Path, format: str = "nvfp4-pack-quantized"
) -> None:
    """Write a quantized Hugging Face ``model`` as a compressed-tensors checkpoint.

    Codes and block scales are copied bit for bit. The global scale of NVFP4 is a divisor, so its
    weights equal ours up to one float32 rounding, exactly where the outer scale is a power of two.

    Raises:
        InterchangeError: the format is unknown, the model is not from transformers, or it has
            weights that the format cannot express; the message names each with the reason.
    """
    if format not in FORMATS:
        raise InterchangeError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    fmt = FORMATS[format]
    if not hasattr(model, "all_tied_weights_keys"):
        raise InterchangeError(
            f"{type(model).__name__} is not a transformers model; the checkpoint would have no "
            "config that another program understands"
        )
    weights = fp4_parameters(model)
    reasons = {name: _reason(model, name, weight, fmt) for name, weight in weights.items()}
    refused = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if refused or not weights:
        raise InterchangeError(
            f"{format} cannot express {len(refused)} of {len(weights)} FP4 weights; quantize with "
            f"blocks of {fmt.block_size} in e2m1 and method='minmax', and leave others out with "
            "ignore=[...]:\n" + "\n".join(refused)
        )
    state = _state(model, weights, fmt)
    directory = Path(directory)
    config = copy.deepcopy(model.config)
    config.quantization_config = _config(model, weights, fmt)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _reason(model: nn.Module, name: str, weight: FP4Tensor, fmt: PackedFormat) -> str | None:
    """Why ``fmt`` cannot express ``weight``, or None."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, nn.Linear):
        return f"only nn.Linear is expressed, this is {type(owner).__name__}"
    if weight.weight_format != "e2m1":
        return f"its format is {weight.weight_format}, only e2m1 is expressed"
    if weight.block_scale is None or weight.block_size != fmt.block_size:
        found = f"blocks of {weight.block_size}" if weight.block_size else "a scale per channel"
        return f"it has {found}, not blocks of {fmt.block_size}"
    if weight.reduction % fmt.block_size:
        return f"K={weight.reduction} is no multiple of {fmt.block_size}"
    if weight.rotation > 1 or weight.exponent_shift is not None:
        return "it is rotated or has exponent shifts, which activations would have to follow"
    if bool((weight.block_scale >= SECOND_FORMAT).any()):
        return "some of its blocks are in a second format"
    if weight.activation_format is None:
        return None
    if fmt.strategy != "tensor_group":
        return "its activations have E4M3 block scales, only weight-only is expressed"
    activation = (weight.activation_format, weight.granularity, weight.block_clip)
    if activation != ("e2m1", "block", 1.0):
        return f"its activations are {activation[0]} per {activation[1]}, not plain e2m1 blocks"
    return None


def _state(model: Any, weights: dict[str, FP4Tensor], fmt: PackedFormat) -> dict[str, Tensor]:
    dropped = tied_aliases(weights, model.all_tied_weights_keys) | set(model.all_tied_weights_keys)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name in dropped:
            continue
        if name not in weights:
            state[name] = value.contiguous()
            continue
        prefix = name.removesuffix("weight")
        state[f"{prefix}weight_packed"] = weights[name].packed_weight
        parts = fmt.scales(name, weights[name])
        state.update({prefix + part: tensor for part, tensor in parts.items()})
    return state


def _config(model: nn.Module, weights: dict[str, FP4Tensor], fmt: PackedFormat) -> dict[str, Any]:
    arguments = {
        "num_bits": 4,
        "type": "float",
        "strategy": fmt.strategy,
        "group_size": fmt.block_size,
        "symmetric": True,
        "scale_dtype": f"torch.{fmt.scale_dtype}",
        "zp_dtype": f"torch.{fmt.scale_dtype}",
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        quantized = weight.activation_format is not None
        inputs = {**arguments, "dynamic": "local", "observer": "static_minmax"}
        group = groups.setdefault(
            f"group_{int(quantized)}",
            {
                "targets": [],
                "weights": {**arguments, "dynamic": False},
                "input_activations": inputs if quantized else None,
                "format": fmt.name,
            },
        )
        group["targets"].append(name.removesuffix(".weight"))
    if len(groups) == 1:
        # By class, as fused layers of other programs have names of their own.
        next(iter(groups.values()))["targets"] = ["Linear"]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": fmt.name,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if f"{name}.weight" not in weights],
    }
