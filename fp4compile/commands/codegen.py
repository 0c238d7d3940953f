"""``fp4compile codegen``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fp4compile
from fp4compile.codegen import codegen, gpu_of
from fp4compile.demo_model import load_demo_model
from fp4compile.errors import CompileError, MissingDependencyError
from fp4compile.tensor import FP4Tensor

EXAMPLES = """
[bold]Examples[/]

  fp4compile codegen demo --target sm_90 --out generated

  fp4compile codegen out/smollm2 --target sm_120 --batch 16 --length 1 --out decode
"""


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A causal language model's folder or name; or 'demo'."
        ),
    ],
    target: Annotated[str, typer.Option(help="The GPU's architecture, as sm_90.")],
    out: Annotated[Path, typer.Option(help="Folder for the generated code.")],
    preset: Annotated[str, typer.Option(help="Bits, where MODEL is not quantized.")] = "w4a4",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many layers; all of them take minutes.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the traced call.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
) -> None:
    """Write the code that a GPU would run for MODEL's forward; no GPU is needed.

    A MODEL that is not quantized is quantized first by min-max: the kernels hardly depend on the
    search. Tiles are chosen for the batch and length given; both stay dynamic where they are not 1.
    """
    gpu_of(target)  # a mistake is told before the model is loaded
    loaded = _load(model, layers)
    ids = torch.randint(loaded.config.vocab_size, (batch, length))
    if not any(isinstance(parameter, FP4Tensor) for parameter in loaded.parameters()):
        fp4compile.quantize(loaded, [ids], preset, method="minmax")
    kernels = codegen(lambda ids: loaded(ids, use_cache=False).logits, (ids,), target, out)
    for kernel in kernels:
        typer.echo(
            f"{kernel.file}  {kernel.registers:>3} registers, {kernel.shared_memory:>6} B shared, "
            f"{kernel.local_memory:>3} B local  {kernel.name[:60]}"
        )
    typer.echo(f"{len(kernels)} kernels for {target} in {out}")


def _load(name: str, layers: int | None) -> Any:
    model = load_demo_model()[0] if name == "demo" else _from_pretrained(name)
    if layers is not None:
        # Where most of transformers' decoders have them.
        blocks = getattr(getattr(model, "model", None), "layers", None)
        if blocks is None:
            raise CompileError(f"{type(model).__name__} has no model.layers; leave out --layers")
        del blocks[layers:]
    return model


def _from_pretrained(name: str) -> Any:
    if find_spec("transformers") is None:
        raise MissingDependencyError(
            "models are loaded by transformers, not installed here; "
            "run: pip install 'fp4compile[hf]'"
        )
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise CompileError(
            f"cannot load {name!r}: {error}; give a causal language model's folder, or 'demo'"
        ) from error
