"""``fp4compile quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

import fp4compile
from fp4compile.commands.loading import load, save
from fp4compile.commands.options import Dtype, JsonPath, Method, Model, Preset, dtype_of, spec_of
from fp4compile.commands.output import emit
from fp4compile.errors import ModelError
from fp4compile.texts import read_texts

EXAMPLES = """
[bold]Examples[/]

  fp4compile quantize demo out/smollm2

  fp4compile quantize HuggingFaceTB/SmolLM2-135M out --method best --data my_text.txt

  fp4compile quantize MODEL out --ignore lm_head --ignore '*.0.*' --report report.html

  fp4compile quantize MODEL out --save-recipe recipe.json  # then: --recipe recipe.json

  fp4compile quantize MODEL out --max-memory 8GiB --calibration-dir runs/a  # killed? say it again
"""


def command(
    model: Model,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)
    ],
    preset: Preset = "w4a4",
    method: Method = "fpq",
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Dynamic activation scales, one per token.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a file (.txt; .jsonl, .csv, .parquet with a column 'text') "
            "or name[:config[:split]] of a data set on the hub. Default: a bundled excerpt."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Quantize only what matches: a glob or 're:<regex>'; repeatable."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave out what matches, the same way; repeatable.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Repeat the run of this recipe: no data, no search.")
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Calibrate each layer on the quantized ones before it."),
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="What calibration may add to the memory in use, like 8GiB.")
    ] = None,
    calibration_dir: Annotated[
        Path | None,
        typer.Option(help="Keeps every decision, so that the same command goes on when killed."),
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Also save the recipe: readable decisions, and codes.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write the report, an HTML page, to this file.")
    ] = None,
    dtype: Dtype = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write into OUT though it holds files.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Quantize MODEL to FP4 and save it, with its recipe, in OUT."""
    spec = spec_of(preset, per_token=per_token)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ModelError(f"{out} holds files already; give a new directory, or --overwrite")
    texts = read_texts(data) if data is not None else None
    loaded = load(model, dtype_of(dtype))
    fp4compile.quantize(
        loaded.model,
        texts,
        spec,
        method=method,
        tokenizer=loaded.needed_tokenizer() if recipe is None else loaded.tokenizer,
        recipe=recipe,
        targets=target,
        ignore=ignore,
        sequential=sequential,
        max_memory=max_memory,
        calibration_dir=calibration_dir,
        report=report,
    )
    save(loaded, out)
    made = loaded.model.fp4_report
    if save_recipe is not None:
        made.recipe.save(save_recipe)
    text = (
        f"{made.summary()}\nsaved in {out}\n"
        f"next: fp4compile generate {out} 'Once upon a time', eval {out}, report {out}"
    )
    emit({**made.to_dict(), "out": str(out)}, Text(text), json_path)
