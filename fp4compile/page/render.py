"""From the content to the text of the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from statistics import median

from jinja2 import Environment, StrictUndefined

from fp4compile.page.content import Page
from fp4compile.page.figures import figures
from fp4compile.page.svg import number, percent

FILES = resources.files("fp4compile") / "page"


def render(page: Page) -> str:
    """The HTML text; styles, script and data are inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "number": number}
    return environment.from_string(_file("page.jinja")).render(
        page=page,
        figures=figures(page),
        facts=_facts(page),
        granularity=_granularity(page),
        weight_formats=_counted(row.weight_format for row in page.rows),
        activation_formats=_counted(row.activation_format or "none" for row in page.rows),
        css=_file("page.css"),
        script=_file("page.js"),
        data=_inline_json(page),
    )


def _facts(page: Page) -> list[tuple[str, str]]:
    errors = [row.error for row in page.rows]
    folded = sum(row.shift_folded_into is not None for row in page.rows)
    return [
        ("weights quantized", str(len(page.rows))),
        ("bits per weight", f"{page.bits_per_weight:.2f}"),
        ("median error of a layer's output", percent(median(errors)) if errors else "none"),
        ("shifts folded for free", str(folded)),
        ("kept in high precision", str(len(page.skipped))),
        ("time", f"{page.seconds:.0f} s"),
    ]


def _granularity(page: Page) -> str:
    """As decided: method "best" changes what the spec leaves open."""
    return " or ".join(sorted({row.granularity for row in page.rows if row.granularity}))


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in Counter(names).most_common())


def _inline_json(page: Page) -> str:
    # "</script>" inside a string would end the element.
    return json.dumps(page.to_dict()).replace("<", "\\u003c")


def _file(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")
