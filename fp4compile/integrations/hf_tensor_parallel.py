"""Tensor parallelism of transformers (``tp_plan``) for FP4 weights.

transformers' styles make DTensors, whose shards it cuts out of every tensor of a checkpoint alike;
an FP4 weight is several tensors that must be cut differently. The styles here do for FP4 weights
what those of the same name do: a process holds a smaller FP4 weight, as a plain parameter. All else
in the plan is left to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    EmbeddingParallel,
    PackedColwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
)

from fp4compile import shards
from fp4compile.errors import ShardingError
from fp4compile.tensor import FP4Tensor

PREFIX = "fp4_"
# On a module: its parameters are no DTensors, so transformers' styles must not make its input one.
LOCAL = "_hf_quantized_needs_local_tp"

# Parameter on the meta device -> attributes of the FP4 weight that will take its place.
_EXPECTED: Any = WeakIdKeyDictionary()
# Parameter on the meta device -> the Cut of the weight that will take its place.
_CUTS: Any = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Cut:
    """What one process holds of a weight: ``ranges`` of its outputs, or of its inputs if
    ``along_k``.
    """

    along_k: bool
    ranges: tuple[tuple[int, int], ...]

    def of(self, name: str, weight: FP4Tensor) -> FP4Tensor:
        """The part of ``weight``, which is called ``name``.

        Raises:
            ShardingError: the weight cannot be cut there.
        """
        if not self.along_k:
            return shards.rows(weight, self.ranges)
        if weight.dim() == 3 and weight.granularity == "token":
            raise ShardingError(
                f"{name}: a stack of experts with one activation scale per token cannot be cut "
                "along K; quantize it with a static scale or with blocks, or leave it out of the "
                "tensor-parallel plan"
            )
        ((start, stop),) = self.ranges
        try:
            return shards.columns(weight, start, stop)
        except ShardingError as error:
            raise ShardingError(f"{name}: {error}") from error


def expect(parameter: Tensor, attributes: Mapping[str, Any]) -> None:
    """``parameter``, on the meta device, will be an FP4 weight with these attributes."""
    _EXPECTED[parameter] = attributes


def use_fp4_styles(model: PreTrainedModel, plan: dict[str, str]) -> None:
    """Replace the styles of ``plan``, ``model``'s for tensor or expert parallelism, by those that
    know FP4 weights.

    Raises:
        ShardingError: the plan that was asked for cuts an FP4 weight in another style.
    """
    asked = model.config.distributed_config
    own = {style: PREFIX + style for style in plan.values() if PREFIX + style in STYLES}
    plan.update({name: own.get(style, style) for name, style in plan.items()})
    by_expert = plan is model.ep_plan
    override = asked.ep_plan if by_expert else asked.tp_plan
    if (asked.ep_size if by_expert else asked.tp_size) > 1:
        _check_styles(model, plan | (override if isinstance(override, dict) else {}))


def _check_styles(model: PreTrainedModel, plan: Mapping[str, str]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter not in _EXPECTED:
            continue
        generic = replace_layer_number_by_wildcard(name)
        style = plan.get(generic) or plan.get(generic.rpartition(".")[0])
        if style is not None and style not in STYLES and _cuts(style):
            raise ShardingError(
                f"{name} is an FP4 weight and its parallel style is {style!r}; FP4 weights have "
                f"the styles {', '.join(STYLES)}: give one in tp_plan={{{generic!r}: ...}}"
            )


def _cuts(style: str) -> bool:
    """Whether a style cuts parameters; some only communicate."""
    return type(ALL_PARALLEL_STYLES[style]).shard_param is not TensorParallelLayer.shard_param


def part_of(name: str, weight: FP4Tensor, parameter: Tensor) -> FP4Tensor:
    """What this process holds of ``weight``, which is called ``name`` and takes the place of
    ``parameter``.

    Raises:
        ShardingError: it cannot be cut there, or is cut by another scheme, like FSDP.
    """
    if isinstance(parameter, DTensor):
        raise ShardingError(
            f"{name} is an FP4 weight and would become a DTensor ({parameter.placements}); of "
            "transformers' parallel schemes FP4 weights have only tensor parallelism: give tp_size "
            "alone"
        )
    cut: Cut | None = _CUTS.get(parameter)
    return weight if cut is None else cut.of(name, weight)


class _Colwise(ColwiseParallel):
    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not _cut_placeholder(module, param, mesh, -2):
            super().shard_param(module, param, mesh)


class _PackedColwise(PackedColwiseParallel):
    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not _cut_placeholder(module, param, mesh, -2, self.split_factor):
            super().shard_param(module, param, mesh)


class _Rowwise(RowwiseParallel):
    """Cut along K; a linear for which that would divide a block or a rotation is cut along N, and
    its input and output are gathered.
    """

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        dim = -2 if isinstance(module, nn.Linear) and _is_indivisible(module, param, mesh) else -1
        if not _cut_placeholder(module, param, mesh, dim):
            super().shard_param(module, param, mesh)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        if not getattr(module, LOCAL, False):
            return super().install_forward(module, mesh)
        cut: Cut = _CUTS[module.weight]
        all_reduce = shards.all_reduce_over(mesh.get_group())
        all_gather = shards.all_gather_over(mesh.get_group())

        def forward(input: Tensor) -> Tensor:
            (x,), _ = self.transform_inputs_pre_forward(module, (input,), {}, mesh)
            bias = module._parameters.get("bias")
            bias = bias.to_local() if isinstance(bias, DTensor) else bias
            if cut.along_k:
                return shards.summed_linear(x, module.weight, bias, all_reduce)
            own = None if bias is None else bias[slice(*cut.ranges[0])]
            return shards.gathered_linear(x, module.weight, own, all_gather)

        module.forward = forward
        return module


class _VocabularyEmbedding(EmbeddingParallel):
    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        if not _cut_placeholder(module, param, mesh, 0):
            super().shard_param(module, param, mesh)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        if not getattr(module, LOCAL, False):
            return super().install_forward(module, mesh)
        all_reduce = shards.all_reduce_over(mesh.get_group())
        ((start, _),) = _ranges(module.num_embeddings, mesh, 1)

        def forward(input: Tensor) -> Tensor:
            return shards.looked_up(input, module.weight, start, all_reduce)

        module.forward = forward
        return module


def _expected(module: nn.Module, param: str) -> tuple[nn.Parameter, Mapping[str, Any]] | None:
    """(placeholder, attributes) of the FP4 weight that ``param`` will be, if it will be one."""
    whole = module._parameters.get(param)
    attributes = None if whole is None else _EXPECTED.get(whole)
    return None if whole is None or attributes is None else (whole, attributes)


def _is_indivisible(module: nn.Module, param: str, mesh: DeviceMesh) -> bool:
    """Whether ``param`` will be an FP4 weight that cannot be cut along K into equal parts."""
    expected = _expected(module, param)
    if expected is None:
        return False
    whole, attributes = expected
    names = ("weight_format", "block_size", "rotation")
    multiple = shards.channel_multiple(*(attributes[name] for name in names))
    if attributes["reduction"] % (mesh.size() * multiple) == 0:
        return False
    if any(size % mesh.size() for size in whole.shape):
        raise ShardingError(
            f"a weight of shape {tuple(whole.shape)} cannot be divided among {mesh.size()} "
            f"processes: its codes, blocks and rotations need multiples of {multiple} along K, and "
            "equal parts of both sides if it is gathered; start fewer processes"
        )
    return True


def _cut_placeholder(
    module: nn.Module, param: str, mesh: DeviceMesh, dim: int, groups: int = 1
) -> bool:
    """Whether ``param`` will be an FP4 weight; if so, its placeholder becomes one of this process's
    part, cut along the logical ``dim``, ``groups`` fused matrices each for itself.
    """
    expected = _expected(module, param)
    if expected is None:
        return False
    whole, attributes = expected
    ranges = _ranges(whole.shape[dim], mesh, groups)
    shape = list(whole.shape)
    shape[dim] = sum(stop - start for start, stop in ranges)
    part = nn.Parameter(torch.empty(shape, dtype=whole.dtype, device="meta"), requires_grad=False)
    module._parameters[param] = part
    along_k = (dim % whole.dim() == whole.dim() - 1) != attributes["transposed"]
    _CUTS[part] = Cut(along_k, ranges)
    setattr(module, LOCAL, True)
    return True


def _ranges(size: int, mesh: DeviceMesh, groups: int) -> tuple[tuple[int, int], ...]:
    """This process's part of each of ``groups`` equal parts of ``size``, as DTensors divide it."""
    part = size // groups
    length, offset = Shard.local_shard_size_and_offset(part, mesh.size(), mesh.get_local_rank())
    if not length:
        raise ShardingError(
            f"{mesh.size()} processes are too many for a weight with a side of {part}; start fewer"
        )
    return tuple((group * part + offset, group * part + offset + length) for group in range(groups))


STYLES: dict[str, Callable[[], Any]] = {
    PREFIX + "colwise": _Colwise,
    PREFIX + "colwise_rep": lambda: _Colwise(output_layouts=Replicate()),
    PREFIX + "colwise_gather_output": lambda: _Colwise(output_layouts=Replicate()),
    PREFIX + "packed_colwise": _PackedColwise,
    PREFIX + "rowwise": _Rowwise,
    PREFIX + "rowwise_rep": lambda: _Rowwise(input_layouts=Replicate()),
    PREFIX + "rowwise_split_input": lambda: _Rowwise(input_layouts=Replicate()),
    PREFIX + "embedding_rowwise": _VocabularyEmbedding,
}
for _name, _make in STYLES.items():
    ALL_PARALLEL_STYLES.register(_name, _make())
