"""Loading of other programs' FP4 checkpoints by transformers, into FP4 weights of ours.

Loaded on first use; see docs/import.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
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
    """Makes FP4 weights of the packed tensors of another program."""

    quantization_config: FP4ImportConfig

    def get_weight_conversions(self) -> list[WeightConverter]:
        fmt = FOREIGN[self.quantization_config.source]
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
        weight = foreign_weight(full_layer_name, self.format, tensors, replaced)
        check_shape(full_layer_name, weight, replaced.shape)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


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
    _check_complete(name, model, info)
    attach(model)
    return (model, info) if wants_info else model


def _check_complete(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    unread = sorted(info["unexpected_keys"])
    missing = sorted(info["missing_keys"])
    if unread or missing or not fp4_parameters(model):
        raise InterchangeError(
            f"{name} does not fit {type(model).__name__}: {len(unread)} of its tensors have no "
            f"place there {unread[:3]}, {len(missing)} weights are not in it {missing[:3]}, "
            f"{len(fp4_parameters(model))} became FP4"
        )
