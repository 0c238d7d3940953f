"""``fp4compile codegen``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Group
from rich.text import Text

import fp4compile
from fp4compile.channel_order import order_channels
from fp4compile.codegen import KernelSummary, codegen, gpu_of
from fp4compile.commands.loading import load
from fp4compile.commands.options import Dtype, JsonPath, Model, Preset, dtype_of, spec_of
from fp4compile.commands.output import emit, table, working
from fp4compile.compile import load_lowerings
from fp4compile.errors import CompileError

EXAMPLES = """
[bold]Examples[/]

  fp4compile codegen demo --layers 2 --target sm_90 --out generated

  fp4compile codegen out/smollm2 --target sm_120 --batch 16 --length 1 --out decode
"""


def command(
    model: Model,
    target: Annotated[str, typer.Option(help="The GPU's architecture, as sm_90 or gfx942.")],
    out: Annotated[Path, typer.Option(help="Directory for the generated code.")],
    preset: Preset = "w4a4",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Keep only so many layers; all of them take minutes.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the traced call.")] = 2,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    dtype: Dtype = "bfloat16",
    json_path: JsonPath = None,
) -> None:
    """Write the code that a GPU would run for MODEL's forward; no GPU is needed.

    A MODEL that is not quantized is quantized first by min-max: the kernels hardly depend on the
    search. Tiles are chosen for the batch and length given; both stay dynamic where they are not 1.
    """
    gpu = gpu_of(target)  # a mistake is told before the model is loaded
    loaded = load(model, dtype_of(dtype))
    network: Any = loaded.model if layers is None else _first(loaded.model, layers)
    ids = torch.randint(network.config.get_text_config().vocab_size, (batch, length))
    if not loaded.is_quantized:
        fp4compile.quantize(network, [ids], spec_of(preset, per_token=False), method="minmax")

    if load_lowerings().multiplies_fp4(gpu.name):
        order_channels(network)  # as compile_model does on that GPU

    def forward(ids: torch.Tensor) -> Any:
        return network(ids, use_cache=False).logits

    with working(f"compiling for {target}"):
        kernels = codegen(forward, (ids,), target, out)
    result = {"model": model, "target": target, "kernels": [asdict(kernel) for kernel in kernels]}
    emit(result, Group(_table(kernels), f"{len(kernels)} kernels for {target} in {out}"), json_path)


def _first(model: Any, layers: int) -> Any:
    # Where most of transformers' decoders have them.
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if blocks is None:
        raise CompileError(f"{type(model).__name__} has no model.layers; leave out --layers")
    del blocks[layers:]
    return model


def _table(kernels: list[KernelSummary]) -> Any:
    made = table("file", "kernel", "registers>", "shared B>", "local B>")
    for kernel in kernels:
        numbers = (kernel.registers, kernel.shared_memory, kernel.local_memory)
        made.add_row(kernel.file, Text(kernel.name[:50]), *map(str, numbers))
    return made
