"""Draws the figures of method.md: python docs/figures/make.py RECIPE

RECIPE is of a language model quantized by fpq; the committed figure is SmolLM2-135M-Instruct's.
"""

import sys
from pathlib import Path

from fp4compile.formats import FORMATS
from fp4compile.page.build import page_of
from fp4compile.page.channels import panel
from fp4compile.page.svg import WIDTH, Scale, dot, drawing, line, text
from fp4compile.recipe import Recipe

HERE = Path(__file__).parent
# An image has no page around it, so the colours come along.
STYLE = """<style>
text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #1c2126 }
.tick, .axis { fill: #5b6670 } .grid { stroke: #e3e7ea } .link { stroke: #9aa5ae }
.m-main { fill: #0072b2 } .c-muted { fill: none; stroke: #9aa5ae; stroke-width: 2 }
.hit { fill: transparent }
@media (prefers-color-scheme: dark) {
  text { fill: #e8ecef } .tick, .axis { fill: #9daab4 } .grid { stroke: #2b3238 }
  .m-main { fill: #56b4e9 }
}
</style>"""


def formats() -> str:
    """The magnitudes of each 4-bit format over its largest, on one line each."""
    scale = Scale(0, 1, 70, WIDTH - 30)
    parts = [STYLE]
    for index, name in enumerate(("e2m1", "e1m2", "e3m0")):
        fmt, y = FORMATS[name], 30 + 46 * index
        parts += [text(12, y + 4, name), line(scale(0), y, scale(1), y, "link")]
        for value in fmt.magnitudes:
            x = scale(value / fmt.max_integer)
            parts += [dot(x, y, "m-main"), text(x, y + 20, str(value), "tick", "middle")]
    parts.append(text(WIDTH / 2, 164, "magnitudes in steps, over the largest", "axis", "middle"))
    return drawing(174, parts, "Values of the 4-bit formats")


def shifts(recipe: Path) -> str:
    """The input of the last down_proj."""
    rows = [row for row in page_of(Recipe.load(recipe)).rows if row.kind == "down_proj"]
    row = max(rows, key=lambda row: row.layer or 0)
    assert row.channels is not None
    drawn = panel(row, row.channels, 64, 36, WIDTH - 90)
    return drawing(220, [STYLE, drawn], f"Channel maxima of the input of {row.name}")


def standalone(svg: str) -> str:
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


if __name__ == "__main__":
    (HERE / "formats.svg").write_text(standalone(formats()))
    (HERE / "shifts.svg").write_text(standalone(shifts(Path(sys.argv[1]))))
