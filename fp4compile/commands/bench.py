"""``fp4compile bench``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Group
from rich.text import Text

import fp4compile
from fp4compile.commands.loading import load
from fp4compile.commands.options import Dtype, JsonPath, Model, Preset, dtype_of, spec_of
from fp4compile.commands.output import emit, table, working
from fp4compile.environment import describe_machine
from fp4compile.timing import Benchmark, Measured

EXAMPLES = """
[bold]Examples[/]

  fp4compile bench out/smollm2 --tokens 128

  fp4compile bench out/smollm2 --batch 16 --tokens 1 --json decode.json

  fp4compile bench demo --preset w4a8 --baseline float32
"""
NO_BASELINE = "none"
SHOWN_OPS = 12


def command(
    model: Model,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 128,
    preset: Preset = "w4a4",
    baseline: Annotated[
        str, typer.Option(help="Dtype to compare with: bfloat16, float32, float16, or none.")
    ] = "bfloat16",
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 9,
    dtype: Dtype = "float32",
    json_path: JsonPath = None,
) -> None:
    """Time MODEL's compiled forward kernel by kernel, beside high precision.

    A MODEL that is not quantized is quantized first, by --preset and min-max: the kernels, and so
    the times, hardly depend on the search.
    """
    spec = spec_of(preset, per_token=False)
    compared = None if baseline == NO_BASELINE else dtype_of(baseline)
    loaded = load(model, dtype_of(dtype))
    if not loaded.is_quantized:
        fp4compile.quantize(
            loaded.model, None, spec, method="minmax", tokenizer=loaded.needed_tokenizer()
        )
    vocabulary = loaded.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, tokens))
    with working("compiling and measuring"):
        found = fp4compile.benchmark(
            loaded.model, {"input_ids": ids}, baseline=compared, repetitions=repetitions
        )
    machine = asdict(describe_machine())
    emit({"model": model, **found.to_dict(), "machine": machine}, _text(found), json_path)


def _text(found: Benchmark) -> Any:
    tables = [_ops("quantized", found.quantized)]
    if found.baseline is not None:
        tables.append(_ops(str(found.baseline_dtype), found.baseline))
    return Group(Text(found.summary()), *(part for made in tables for part in ("", made)))


def _ops(name: str, measured: Measured) -> Any:
    made = table("kernel", "kind", "calls>", "ms per forward>", "share>", title=name)
    for op in measured.ops[:SHOWN_OPS]:
        numbers = (f"{op.calls:.0f}", f"{1e3 * op.seconds:.3f}", f"{op.share:.1%}")
        made.add_row(Text(op.name[:60]), op.kind, *numbers)
    return made
