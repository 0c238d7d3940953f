"""Loading of other programs' FP4 checkpoints by transformers, into FP4 weights of ours.

Loaded on first use; see docs/import.md.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer

from fp4compile.errors import InterchangeError, ShardingError
from fp4compile.integrations.foreign import FOREIGN, ForeignFormat, foreign_weight, format_of
from fp4compile.integrations.hf_quantizer import (
    METHOD,
    FP4CompileConfig,
    FP4CompileQuantizer,
    PartsToWeight,
    attach,
)
from fp4compile.integrations.serialize import check_shape, fp4_parameters

logger = logging.getLogger("fp4compile")

IMPORT = f"{METHOD}-import"
# Of from_pretrained: what says where a checkpoint is, and so concerns its config too.
LOCATION = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@register_quantization_config(IMPORT)
class FP4ImportConfig(FP4CompileConfig):
    """Stands in a config while a checkpoint of the format ``source`` is read."""

    def __init__(self, source: str, **_: Any) -> None:
        super().__init__()
        self.quant_method = IMPORT
        self.source = source


@register_quantizer(IMPORT)
class FP4ImportQuantizer(FP4CompileQuantizer):
    """Makes FP4 weights of the packed tensors of another program.

    ``kept``: names of weights that are in high precision instead, and why.
    """

    quantization_config: FP4ImportConfig
    kept: dict[str, str]

    def get_weight_conversions(self) -> list[WeightConverter]:
        fmt = FOREIGN[self.quantization_config.source]
        self.kept = {}
        return [WeightConverter(list(fmt.tensors), fmt.target, [_Translate(self, fmt)])]

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        distributed = getattr(model.config, "distributed_config", None)
        if distributed is not None and distributed.tp_size > 1:
            raise ShardingError(
                "another program's checkpoint is not divided while it is read; load it in one "
                "process, save_pretrained it, and load that with tp_size"
            )


class _Translate(PartsToWeight):
    """Tensors of one foreign weight to the weight."""

    hf_quantizer: FP4ImportQuantizer

    def __init__(self, hf_quantizer: FP4ImportQuantizer, fmt: ForeignFormat) -> None:
        super().__init__(hf_quantizer)
        self.format = fmt

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {self.format.tensors[name]: found[0] for name, found in input_dict.items()}
        replaced = model.get_parameter(full_layer_name)
        if self.format.plain is not None and tensors.keys() == {"packed"}:
            plain = tensors["packed"].to(replaced.dtype)  # never quantized
            return {full_layer_name: nn.Parameter(plain, requires_grad=False)}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        # bitsandbytes turns the weights of these.
        turned = self.format.plain is not None and isinstance(module, Conv1D)
        weight = self._weight(full_layer_name, tensors, replaced, turned=turned)
        check_shape(full_layer_name, weight, replaced.shape)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}

    def _weight(
        self, name: str, tensors: dict[str, Tensor], replaced: Tensor, *, turned: bool
    ) -> Tensor:
        fmt = replace(self.format, transposed=self.format.transposed or turned)
        try:
            return foreign_weight(name, fmt, tensors, replaced)
        except InterchangeError as error:
            if fmt.plain is None:
                raise
            self.hf_quantizer.kept[name] = str(error).removeprefix(f"{name}: ")
        plain = fmt.plain(tensors).to(replaced.dtype)
        return plain.t().contiguous() if turned else plain


def load(name: str, auto_class: Any, **options: Any) -> PreTrainedModel:
    """``fp4compile.from_pretrained`` with an Auto class."""
    location = {key: options[key] for key in LOCATION if key in options}
    config = options.pop("config", None) or AutoConfig.from_pretrained(name, **location)
    found = getattr(config, "quantization_config", None)
    if found is None:
        raise InterchangeError(
            f"{name} is in full precision; load it by {auto_class.__name__}.from_pretrained and "
            "call fp4compile.quantize(model, data)"
        )
    about = found if isinstance(found, dict) else found.to_dict()
    if about["quant_method"] == METHOD:
        return auto_class.from_pretrained(name, config=config, **options)
    config.quantization_config = {"quant_method": IMPORT, "source": format_of(about)}
    wants_info = options.pop("output_loading_info", False)
    model, info = auto_class.from_pretrained(
        name, config=config, output_loading_info=True, **options
    )
    kept = model.hf_quantizer.kept
    _check_complete(name, model, info, kept)
    attach(model, kept)
    return (model, info) if wants_info else model


def _check_complete(
    name: str, model: PreTrainedModel, info: dict[str, Any], kept: dict[str, str]
) -> None:
    unread = sorted(info["unexpected_keys"])
    missing = sorted(info["missing_keys"])
    weights = fp4_parameters(model)
    if kept and not weights:
        raise InterchangeError(
            f"no FP4 weight here means what one of the {len(kept)} of {name} does: {_named(kept)}. "
            "Load it dequantized, or the full-precision model, and call fp4compile.quantize"
        )
    if unread or missing or not weights:
        raise InterchangeError(
            f"{name} does not fit {type(model).__name__}: {len(unread)} of its tensors have no "
            f"place there {unread[:3]}, {len(missing)} weights are not in it {missing[:3]}, "
            f"{len(weights)} became FP4"
        )
    if kept:
        logger.warning("%d weights of %s stay in high precision: %s", len(kept), name, _named(kept))


def _named(kept: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in kept.items())
