"""``torchao.quantize_(model, fp4compile.FP4Config(...))``: FP4 weights without calibration data.

Importing torchao takes seconds, so this file is loaded when ``fp4compile.FP4Config`` is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from fp4compile.errors import AlreadyQuantizedError, SelectionError, SpecError
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.qparams import ActivationQParams, QuantSpec, SiteQParams
from fp4compile.search import SearchOptions, by_method
from fp4compile.search.candidates import minmax_format
from fp4compile.selection import as_spec
from fp4compile.tensor import FP4Tensor

WITH_BLOCKS = ("best", "minmax")


@dataclass
class FP4Config(AOBaseConfig):
    """FP4 weights, and activations scaled dynamically, for ``torchao.quantize_``.

    It sees one module after the other and no data, so weights are decided by themselves alone,
    and activations have one scale per token, in the first format of their spec (E2M1, E2M3 and E4M3
    by default). ``fp4compile.quantize`` with data is more accurate.

    ``spec``: ``"w4a16"`` (weight-only), ``"w4a4"``, ``"w4a8"``, ... (dynamic: the preset with
    activations per token and without exponent shifts), or a :class:`QuantSpec` whose activation
    has a scale per token. ``method``: ``"minmax"``, or a search of formats and clipping, as in
    ``fp4compile.quantize``.

    Raises:
        SpecError: no such preset or method, or an activation that needs calibration data.
    """

    spec: str | QuantSpec = "w4a16"
    method: str = "fpq"

    def __post_init__(self) -> None:
        by_method(self.method)
        spec = _dynamic(self.spec)
        refuse_blocks = self.method not in WITH_BLOCKS
        if refuse_blocks and any(
            part and part.block_size for part in (spec.weight, spec.embedding)
        ):
            raise SpecError(
                f"method={self.method!r} has no block scales; use one of {', '.join(WITH_BLOCKS)}"
            )


def _dynamic(asked: str | QuantSpec) -> QuantSpec:
    """The spec with dynamic activations."""
    spec = as_spec(asked)
    if isinstance(asked, str) and spec.activation is not None:
        return replace(
            spec, activation=replace(spec.activation, granularity="token", exponent_shift=False)
        )
    activation = spec.activation
    if activation is not None and (activation.granularity != "token" or activation.exponent_shift):
        raise SpecError(
            f"torchao's quantize_ has no calibration data, and {activation} needs some; give the "
            "activation granularity='token' and no exponent shifts, or call "
            "fp4compile.quantize(model, data)"
        )
    return spec


@register_quantize_module_handler(FP4Config)
def quantize_module(module: nn.Module, config: FP4Config) -> nn.Module:
    """``module`` with its ``weight`` as an FP4 weight: a linear, or an embedding.

    Raises:
        SelectionError: the module is neither, so what its weight does is not known.
        AlreadyQuantizedError: the weight is an FP4 weight.
    """
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise SelectionError(
            f"FP4Config is for nn.Linear and nn.Embedding, not {type(module).__name__}; narrow the "
            "filter_fn of quantize_, or call fp4compile.quantize(model, data), which traces"
        )
    if isinstance(module.weight, FP4Tensor):
        raise AlreadyQuantizedError("the model is quantized already; load it again")
    spec = _dynamic(config.spec)
    is_linear = isinstance(module, nn.Linear)
    wanted = spec.weight if is_linear else spec.embedding
    if wanted is None:
        return module
    weight = module.weight.detach().to(torch.float32)
    decided = by_method(config.method).search_lookup(weight, wanted, None, SearchOptions())
    activation = _activation(spec) if is_linear else None
    packed = fp4_weight(weight, SiteQParams(decided, activation, 0.0, 0.0), module.weight.dtype)
    module.weight = nn.Parameter(packed, requires_grad=False)
    return module.requires_grad_(False)


def _activation(spec: QuantSpec) -> ActivationQParams | None:
    if spec.activation is None:
        return None
    nothing_clipped: Tensor = torch.ones(())
    return ActivationQParams(minmax_format(spec.activation).name, "token", nothing_clipped)
