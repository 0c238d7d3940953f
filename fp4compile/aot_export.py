"""A quantized model as one compiled file that runs without fp4compile."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fp4compile.batches import Batch, as_batches, example_call
from fp4compile.compile import load_lowerings
from fp4compile.coverage import traced_call
from fp4compile.errors import CompileError
from fp4compile.integrations.serialize import fp4_parameters
from fp4compile.tensor import FP4Tensor
from fp4compile.trace import dynamic_shape

MARKER = "// fp4compile {"
# How generated C++ calls an op that was not compiled.
OP_CALLS = ("aoti_torch_proxy_executor_call_function(", 'call_dispatcher("fp4::')
KEY = "fp4compile"


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Path:
    """Compile a quantized ``model`` by AOTInductor into ``path``, for this machine's CPU.

    The file holds weights and kernels; any process with the same torch runs it, in C++ too, with
    ``torch._inductor.aoti_load_package``. :func:`load_exported` does the same after checking that
    the CPU has the instructions that the file was compiled for.

    Args:
        path: must end in ``.pt2``.
        example_inputs: positional arguments, or a mapping of keyword arguments; None: those that
            the model was traced with. Tensors need a batch of at least 2.
        dynamic_shapes: as in ``torch.export.export``, in the form of ``example_inputs``; None:
            batch and sequence are dynamic.

    Returns:
        ``path``. The program takes the tensors of ``example_inputs``, positional or by keyword as
        there; other arguments are fixed. It returns what the forward does; of a Hugging Face
        output its tensors, by name, without a cache.

    Raises:
        CompileError: the model is not quantized or not on a CPU; a weight has no kernel here and
            would need fp4compile at run time; or torch.export refuses the model.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise CompileError(f"{path} must end in .pt2")
    weights = fp4_parameters(model)
    if not weights:
        raise CompileError("the model has no FP4 weights; call fp4compile.quantize first")
    lowering = load_lowerings()
    _refuse_references(weights, lowering)
    args, kwargs = _call(model, example_inputs)
    fixed = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    kwargs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    shapes = {
        "args": pytree.tree_map(dynamic_shape, args),
        "kwargs": pytree.tree_map(dynamic_shape, kwargs),
    }
    if isinstance(dynamic_shapes, Mapping):
        shapes["kwargs"] |= dynamic_shapes
    elif dynamic_shapes is not None:
        shapes["args"] = tuple(dynamic_shapes)
    shapes = {name: dims for name, dims in shapes.items() if dims}
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _Tensors(model, fixed), args, kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch.export raises a dozen types; all mean the same to a user
        raise CompileError(
            f"torch.export could not export {type(model).__name__}: {error}"
        ) from error
    code = lowering.package.compile_package(exported, path, {"cpu": cpu_features()})
    if MARKER not in code or any(call in code for call in OP_CALLS):
        path.unlink()
        raise CompileError(
            f"an fp4:: op was not compiled, so {path} would need fp4compile to run and was "
            "removed; the log of fp4compile.lowering has the reason"
        )
    return path


def load_exported(path: str | Path) -> Callable[..., Any]:
    """The program that :func:`export` wrote, ready to be called.

    Raises:
        CompileError: there is no such program in ``path``, or this CPU lacks instructions that it
            was compiled for.
    """
    needed = _recorded(Path(path)).get("cpu", [])
    missing = sorted(set(needed) - set(cpu_features()))
    if missing:
        raise CompileError(
            f"{path} was compiled for a CPU with {', '.join(missing)}, which this one has not; "
            "export the model again on this machine"
        )
    program: Callable[..., Any] = load_lowerings().package.load_package(Path(path))
    return program


def cpu_features() -> list[str]:
    """Instruction sets of this CPU; Inductor lets the compiler use all of them."""
    return sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)


class _Tensors(nn.Module):
    """``model`` with plain tensors as results (a ModelOutput needs transformers to be rebuilt), and
    with the arguments that are no tensors fixed.
    """

    def __init__(self, model: nn.Module, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.fixed = model, dict(fixed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.model(*args, **kwargs, **self.fixed)
        if isinstance(out, Mapping):
            return {name: value for name, value in out.items() if isinstance(value, Tensor)}
        return out


def _call(model: nn.Module, example_inputs: Any) -> Batch:
    if example_inputs is None:
        return traced_call(model)
    return example_call(as_batches([example_inputs], model)[0])


def _refuse_references(weights: Mapping[str, FP4Tensor], lowering: Any) -> None:
    reasons = {}
    for name, weight in weights.items():
        if weight.device.type != "cpu":
            raise CompileError(f"{name} is on {weight.device}; move the model to the CPU first")
        choice = lowering.kernel_for(weight, False)
        if choice.is_reference:
            reasons[name] = choice.reason
    if reasons:
        raise CompileError(
            f"{len(reasons)} weights have no kernel here and would need fp4compile to run: "
            + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        )


def _recorded(path: Path) -> dict[str, Any]:
    """What :func:`export` put into the metadata of the package."""
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if name.endswith("_metadata.json"):
                    about: dict[str, Any] = json.loads(json.loads(file.read(name))[KEY])
                    return about
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise CompileError(f"{path} was not written by fp4compile.export: {error}") from error
    raise CompileError(f"{path} was not written by fp4compile.export: it has no metadata")
