"""``fp4compile inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from fp4compile.batches import example_call, only_example
from fp4compile.commands.loading import load, saved_report
from fp4compile.commands.options import JsonPath, Model
from fp4compile.commands.output import emit, table
from fp4compile.evaluate import model_size
from fp4compile.names import kinds
from fp4compile.recipe import Recipe
from fp4compile.tensor import FP4Tensor
from fp4compile.trace import Graph, trace

EXAMPLES = """
[bold]Examples[/]

  fp4compile inspect out/smollm2  # a quantized model: formats, bits, errors

  fp4compile inspect recipe.json --sites  # a recipe, weight by weight

  fp4compile inspect demo  # not quantized: what would be, and what not and why
"""
UNKNOWN = "-"


@dataclass(frozen=True)
class SiteRow:
    """One weight as it is stored, or as it would be found."""

    name: str
    shape: tuple[int, ...] | None
    weight_format: str
    activation_format: str
    granularity: str
    bits_per_weight: float | None
    error: float | None


def command(
    model: Model,
    sites: Annotated[
        bool, typer.Option("--sites", help="A row per weight instead of one per kind.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Formats, bits and sites of a model, quantized or not, or of a recipe (a .json file)."""
    path = Path(model)
    found = _of_recipe(path) if path.suffix == ".json" and path.is_file() else _of_model(model)
    rows: list[SiteRow] = found.pop("sites")
    result = {**found, "sites": [asdict(row) for row in rows]}
    shown = _by_site(rows) if sites else _by_kind(rows)
    emit(result, Group(_facts(found), "", shown, *_skipped(found["skipped"])), json_path)


def _of_recipe(path: Path) -> dict[str, Any]:
    recipe = Recipe.load(path)
    return {
        "what": f"recipe {path}",
        "sites": _recipe_rows(recipe),
        "skipped": dict(recipe.skipped),
    }


def _recipe_rows(recipe: Recipe) -> list[SiteRow]:
    return [
        SiteRow(
            name,
            None,
            site.weight.format,
            site.activation.format if site.activation else UNKNOWN,
            site.activation.granularity if site.activation else UNKNOWN,
            None,
            site.error,
        )
        for name, site in recipe.sites.items()
    ]


def _of_model(name: str) -> dict[str, Any]:
    loaded = load(name, None)
    model, size = loaded.model, model_size(loaded.model)
    facts = {
        "what": f"{'FP4' if loaded.is_quantized else 'full-precision'} {type(model).__name__}",
        "parameters": size.weights,
        "bytes": size.bytes,
        "bits_per_parameter": size.bits_per_weight,
    }
    if loaded.is_quantized:
        report = saved_report(Path(name))
        errors = {row.name: row.error for row in report.rows} if report else {}
        skipped = dict(report.skipped) if report else {}
        return {**facts, "sites": _stored_rows(model, errors), "skipped": skipped}
    graph = trace(model, *example_call(only_example(None, model, loaded.tokenizer)))
    return {**facts, "sites": _traced_rows(model, graph), "skipped": dict(graph.skipped)}


def _stored_rows(model: Any, errors: Mapping[str, float]) -> list[SiteRow]:
    rows = []
    for name, weight in model.named_parameters():
        if isinstance(weight, FP4Tensor):
            rows.append(
                SiteRow(
                    name,
                    tuple(weight.shape),
                    weight.weight_format,
                    weight.activation_format or UNKNOWN,
                    weight.granularity if weight.activation_format else UNKNOWN,
                    8 * weight.stored_bytes / weight.numel(),
                    errors.get(name),
                )
            )
    return rows


def _traced_rows(model: Any, graph: Graph) -> list[SiteRow]:
    rows = []
    for site in graph.sites:
        weight = model.get_parameter(site.name)
        dtype, bits = str(weight.dtype).removeprefix("torch."), 8.0 * weight.itemsize
        rows.append(SiteRow(site.name, tuple(weight.shape), dtype, UNKNOWN, UNKNOWN, bits, None))
    return rows


def _facts(found: dict[str, Any]) -> Any:
    made = table("", ">")
    made.add_row("what", found["what"])
    if "parameters" in found:
        made.add_row("parameters", f"{found['parameters']:,}")
        made.add_row("size", f"{found['bytes'] / 1e6:.1f} MB")
        made.add_row("bits per parameter", f"{found['bits_per_parameter']:.2f}")
    return made


def _by_site(rows: Sequence[SiteRow]) -> Any:
    made = table("weight", "shape", "format", "activation", "scale per", "bits>", "error>")
    for row in rows:
        shape = UNKNOWN if row.shape is None else "x".join(map(str, row.shape))
        made.add_row(row.name, shape, *_formats([row]), *_numbers([row]))
    return made


def _by_kind(rows: Sequence[SiteRow]) -> Any:
    made = table("kind", "weights>", "format", "activation", "scale per", "bits>", "median error>")
    kind_of = kinds(row.name for row in rows)
    for kind in dict.fromkeys(kind_of.values()):
        same = [row for row in rows if kind_of[row.name] == kind]
        made.add_row(kind, str(len(same)), *_formats(same), *_numbers(same))
    return made


def _formats(rows: Sequence[SiteRow]) -> tuple[str, str, str]:
    def distinct(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    return (
        distinct(row.weight_format for row in rows),
        distinct(row.activation_format for row in rows),
        distinct(row.granularity for row in rows),
    )


def _numbers(rows: Sequence[SiteRow]) -> tuple[str, str]:
    bits = [row.bits_per_weight for row in rows if row.bits_per_weight is not None]
    errors = [row.error for row in rows if row.error is not None]
    return (
        f"{median(bits):.2f}" if bits else UNKNOWN,
        f"{median(errors):.4f}" if errors else UNKNOWN,
    )


def _skipped(skipped: dict[str, str]) -> list[Any]:
    if not skipped:
        return []
    made = table("in high precision", "why")
    for name, why in skipped.items():
        made.add_row(Text(name), Text(why))
    return ["", made]
