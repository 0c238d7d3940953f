"""``save_pretrained`` and ``from_pretrained`` of quantized models, as a transformers quantizer.

Loaded by ``integrations/__init__.py`` when transformers is; see docs/transformers.md.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4compile.attention_products import AttentionProducts
from fp4compile.errors import CheckpointError, ShardingError
from fp4compile.formats import alternatives

# The module: whichever of the two is imported first, transformers imports the other from within.
from fp4compile.integrations import attention
from fp4compile.integrations.serialize import (
    attribute_groups,
    attributes_by_name,
    bits_per_parameter,
    check_shape,
    flattened,
    fp4_parameters,
    restored,
    tied_aliases,
)
from fp4compile.plain_weights import use_plain_weights
from fp4compile.report import Report
from fp4compile.tensor import FP4Tensor

logger = logging.getLogger("fp4compile")

METHOD = "fp4compile"
# Of what is written; a change that older versions cannot read counts it up.
FORMAT_VERSION = 1


@register_quantization_config(METHOD)
class FP4CompileConfig(QuantizationConfigMixin):
    """``quantization_config`` of a quantized model's config.json.

    ``groups``: the attributes of :class:`FP4Tensor`, each with the names of the "weights" that
    have them; ``skipped``: why other weights are in high precision; ``products``: the operands of
    quantized attentions.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]] = (),
        bits_per_parameter: float | None = None,
        skipped: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        products: Mapping[str, Mapping[str, Any]] | None = None,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has fp4compile format {format_version}, this version reads "
                f"{FORMAT_VERSION}; install a matching fp4compile, or quantize the model again"
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits_per_parameter = bits_per_parameter
        self.groups = [dict(group) for group in groups]
        self.skipped = dict(skipped or {})
        self.products = dict(products or {})

    @classmethod
    def of(cls, model: nn.Module) -> FP4CompileConfig:
        """The config that describes ``model``'s FP4 weights."""
        # The report of the run; a loaded model has none, but says what it was loaded with.
        known = getattr(model, "fp4_report", None)
        if not isinstance(known, Report):
            known = getattr(getattr(model, "config", None), "quantization_config", None)
        return cls(
            attribute_groups(fp4_parameters(model)),
            round(bits_per_parameter(model), 4),
            known.skipped if isinstance(known, Report | FP4CompileConfig) else None,
            products={name: made.to_dict() for name, made in attention.products_of(model).items()},
        )


@register_quantizer(METHOD)
class FP4CompileQuantizer(HfQuantizer):
    """Writes FP4 weights as plain tensors, and makes them again while a checkpoint is read.

    The model comes on the meta device, so only packed codes are ever in memory.
    """

    quantization_config: FP4CompileConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "this checkpoint is in high precision, and FP4 needs calibration: load it without "
                "quantization_config and call fp4compile.quantize(model, data)"
            )
        self.attributes = attributes_by_name(self.quantization_config.groups)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        if (model._tp_size or 1) > 1:
            raise ShardingError(
                "every process holds a part of the model, and parts are not saved; load it in one "
                "process without tp_size, or copy the checkpoint that it was loaded from"
            )
        # What is in the model now: it may have been cast or partly replaced since.
        config = FP4CompileConfig.of(model)
        model.config.quantization_config = self.quantization_config = config
        weights = fp4_parameters(model)
        if any(weight.dim() > 2 for weight in weights.values()):
            # Stacks of experts are written as they are: to take them apart, transformers would cut
            # their codes like plain weights. It reads either.
            model._weight_conversions = []
        state = flattened(model.state_dict(), tied_aliases(weights, model.all_tied_weights_keys))
        logger.info(
            "saving %d FP4 weights, %.2f bits per parameter over the whole model",
            len({id(weight) for weight in weights.values()}),
            config.bits_per_parameter,
        )
        return state, {}

    def attributes_of(self, model: PreTrainedModel, name: str) -> dict[str, Any] | None:
        """Attributes of the weight called ``name`` in ``model``, or None: no FP4 weight.

        A head's checkpoint names the base model's weights with a prefix, and the reverse.
        """
        prefix = f"{model.base_model_prefix}."
        for known in (name, prefix + name, name.removeprefix(prefix)):
            if known in self.attributes:
                return self.attributes[known]
        return None

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        attributes = self.attributes_of(model, param_name)
        if attributes is None:
            return float(param.element_size())
        return alternatives(attributes["weight_format"])[0].bits / 8

    def get_weight_conversions(self) -> list[WeightConverter]:
        # One pattern for all parts; the parameter keeps its name.
        sources = [rf"\.{part}$" for part in FP4Tensor.TENSORS]
        return [WeightConverter(sources, "", [_Restore(self)])]

    # fp4compile.integrations.hf_tensor_parallel, once several processes share a model: it needs
    # torch's DTensors, which take a second to import.
    parallel: Any = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is None:
            return
        self.parallel = importlib.import_module("fp4compile.integrations.hf_tensor_parallel")
        for name, parameter in model.named_parameters(remove_duplicate=False):
            attributes = self.attributes_of(model, name)
            if attributes is not None:
                self.parallel.expect(parameter, attributes)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        if self.parallel is not None:
            self.parallel.use_fp4_styles(model, plan)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        model.requires_grad_(False)
        attention.attach_products(
            model,
            {
                self._module_of(model, name): AttentionProducts.from_dict(operands)
                for name, operands in self.quantization_config.products.items()
            },
        )
        # Saving reverts conversions; ours is done by get_state_dict_and_metadata.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(
                isinstance(op, PartsToWeight) for op in getattr(conversion, "operations", ())
            )
        ]

    def _module_of(self, model: PreTrainedModel, name: str) -> str:
        """``name`` as ``model`` has it, with or without the prefix of the base model."""
        prefix = f"{model.base_model_prefix}."
        known = {module for module, _ in model.named_modules()}
        return next(n for n in (name, prefix + name, name.removeprefix(prefix)) if n in known)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        types = {name: weight.dtype for name, weight in fp4_parameters(model).items()}
        use_plain_weights(model)
        for name, logical in types.items():
            weight = model.get_parameter(name)
            weight.data = weight.data.to(dtype or logical)
        _untie_what_parted(model)
        return model


def _untie_what_parted(model: PreTrainedModel) -> None:
    """Tied weights that are two now are saved as two."""
    tied = model.all_tied_weights_keys
    parted = {
        name
        for name, other in tied.items()
        if model.get_parameter(name) is not model.get_parameter(other)
    }
    if parted:
        model.all_tied_weights_keys = {
            name: other for name, other in tied.items() if name not in parted
        }
        model.config.tie_word_embeddings = False


class PartsToWeight(ConversionOps):
    """Several tensors of a checkpoint to one FP4 weight."""

    def __init__(self, hf_quantizer: FP4CompileQuantizer) -> None:
        # Under this name transformers looks for it: it then leaves the dtype of the parts alone.
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> PartsToWeight:
        # transformers copies the operation for every tensor that it reads, and with it would copy
        # the attributes of all weights: 25 MB for the 272 tensors of SmolLM2-135M.
        return self


class _Restore(PartsToWeight):
    """Parts of one weight to the weight."""

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
        attributes = self.hf_quantizer.attributes_of(model, full_layer_name)
        if attributes is None:
            raise CheckpointError(
                f"{full_layer_name} is packed, but quantization_config in config.json does not "
                "name it; config.json and the weights belong to different models"
            )
        names = dict(zip(source_patterns, FP4Tensor.TENSORS, strict=True))
        parts = {names[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        replaced = model.get_parameter(full_layer_name)
        weight = restored(full_layer_name, parts, attributes, replaced.dtype)
        if self.hf_quantizer.parallel is not None:
            weight = self.hf_quantizer.parallel.part_of(full_layer_name, weight, replaced)
        check_shape(full_layer_name, weight, replaced.shape)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


def attach(model: PreTrainedModel, skipped: Mapping[str, str] | None = None) -> None:
    """Let ``model.save_pretrained`` write its FP4 weights, as after ``from_pretrained``.

    ``skipped``: why other weights are in high precision, where no report says it.
    """
    model.config.quantization_config = FP4CompileConfig(skipped=skipped)
    config = FP4CompileConfig.of(model)
    quantizer = FP4CompileQuantizer(config)
    quantizer.attributes = attributes_by_name(config.groups)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = METHOD
