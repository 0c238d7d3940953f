"""``fp4compile report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fp4compile.commands.loading import REPORT_FILE, saved_report
from fp4compile.commands.options import JsonPath
from fp4compile.commands.output import emit
from fp4compile.errors import ReportError
from fp4compile.page import write_page
from fp4compile.recipe import Recipe
from fp4compile.timing import Benchmark

EXAMPLES = """
[bold]Examples[/]

  fp4compile report out/smollm2

  fp4compile report recipe.json --out report.html --json report.json

  fp4compile report out/smollm2 --bench prefill.json --bench decode.json
"""


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, or the directory that fp4compile quantize wrote.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    bench: Annotated[
        list[Path] | None,
        typer.Option(help="Also show the speed: what fp4compile bench --json wrote; repeatable."),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Write what was decided as one HTML page: errors, formats, channels, sensitivity."""
    found = Recipe.load(source) if source.is_file() else saved_report(source)
    if found is None:
        raise ReportError(
            f"{source} is neither a recipe nor a directory with a {REPORT_FILE}; give what "
            "fp4compile quantize or model.fp4_report.recipe.save wrote"
        )
    benchmarks = [_read_benchmark(path) for path in bench or ()]
    page = write_page(found, out, benchmarks)
    emit(page.to_dict(), f"wrote {out}", json_path)


def _read_benchmark(path: Path) -> Benchmark:
    try:
        return Benchmark.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read the benchmark {path}: {error}") from error
