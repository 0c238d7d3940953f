"""The report page: self-contained, well-formed, and its numbers are those of the run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn

import fp4compile
from fp4compile import cli
from fp4compile.commands.loading import REPORT_FILE
from fp4compile.errors import ReportError
from fp4compile.page import page_of, write_page
from fp4compile.page.content import Page, Row, sensitivity_curve
from fp4compile.page.svg import Scale, log_scale, percent
from fp4compile.qparams import SiteQParams

SKIPPED = "model.layers.1.mlp.up_proj.weight"
BROWSER_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--allow-file-access-from-files",
    "--virtual-time-budget=3000",
)
VOID = frozenset({"meta", "input", "link", "br", "hr", "img"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model with shifts and something left out, and its page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    search = fp4compile.SearchOptions(rounding="nearest", rounds=1)
    model = fp4compile.quantize(
        tiny_llama(),
        [tokens()],
        ignore=["*.1.mlp.up_proj"],
        search=search,
        progress=False,
        report=path,
    )
    return model, path


@pytest.fixture(scope="module")
def page(run: tuple[nn.Module, Path]) -> Page:
    return page_of(run[0].fp4_report)


class Reader(HTMLParser):
    """Elements in order, an error where they do not nest; the texts of scripts by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self.found[-1][1].get("id")] = data


def test_the_page_is_well_formed_and_loads_nothing(run: tuple[nn.Module, Path]) -> None:
    text = run[1].read_text()
    reader = Reader(text)
    loading = {"src", "href", "srcset", "action"}
    assert not [found for found in reader.found if loading & set(found[1])]
    assert not re.search(r"@import|url\(|https?://", text)
    assert {tag for tag, _ in reader.found} >= {"svg", "table", "style", "script"}


def test_its_data_are_those_of_the_report(run: tuple[nn.Module, Path], page: Page) -> None:
    model, path = run
    data = json.loads(Reader(path.read_text()).scripts["data"])
    assert data == json.loads(json.dumps(page.to_dict()))
    report = model.fp4_report
    assert [row["name"] for row in data["rows"]] == [site.name for site in report.sites]
    assert [row["error"] for row in data["rows"]] == [site.error for site in report.sites]
    assert data["skipped"] == {SKIPPED: "in ignore"}
    bits = sum(row["bits"] * row["shape"][0] * row["shape"][1] for row in data["rows"])
    elements = sum(row["shape"][0] * row["shape"][1] for row in data["rows"])
    assert bits / elements == pytest.approx(report.bits_per_weight)


def test_every_weight_and_reason_is_on_the_page(run: tuple[nn.Module, Path], page: Page) -> None:
    text = run[1].read_text()
    for name in (*(row.name for row in page.rows), SKIPPED, "in ignore"):
        assert f"<td>{name}</td>" in text


def _drawings(text: str) -> Iterator[ElementTree.Element]:
    for found in re.findall(r"<svg viewBox=\"0 0 680.*?</svg>", text, re.DOTALL):
        yield ElementTree.fromstring(found)


def test_every_figure_is_drawn_within_its_frame(run: tuple[nn.Module, Path]) -> None:
    drawings = list(_drawings(run[1].read_text()))
    assert len(drawings) == 7
    for drawing in drawings:
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        assert drawing.attrib["aria-label"]
        for mark in drawing.iter():
            x = mark.attrib.get("cx") or mark.attrib.get("x") or mark.attrib.get("x1") or 0
            y = mark.attrib.get("cy") or mark.attrib.get("y") or mark.attrib.get("y1") or 0
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_a_recipe_from_disk_gives_the_same_page(
    run: tuple[nn.Module, Path], page: Page, tmp_path: Path
) -> None:
    run[0].fp4_report.recipe.save(tmp_path / "recipe.json")
    assert page_of(fp4compile.Recipe.load(tmp_path / "recipe.json")) == page


@pytest.mark.parametrize("source", ["recipe.json", "."], ids=["recipe", "model"])
def test_the_command_writes_page_and_json(
    source: str,
    run: tuple[nn.Module, Path],
    page: Page,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run[0].fp4_report.recipe.save(tmp_path / "recipe.json")
    (tmp_path / REPORT_FILE).write_text(json.dumps(page.to_dict()))
    out, numbers = tmp_path / "out.html", tmp_path / "out.json"
    arguments = ["report", str(tmp_path / source), "--out", str(out), "--json", str(numbers)]
    monkeypatch.setattr("sys.argv", ["fp4compile", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert out.read_text() == run[1].read_text()
    assert json.loads(numbers.read_text()) == json.loads(json.dumps(page.to_dict()))


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(ReportError, match="this is no report"):
        Page.from_dict({"rows": []})


def _error_of(site: SiteQParams) -> tuple[float, float, float]:
    assert site.diagnosis is not None
    return site.error, site.diagnosis.weight_error, site.diagnosis.activation_error


def test_weights_alone_and_activations_alone_err_less_than_both(
    run: tuple[nn.Module, Path],
) -> None:
    """On average: single layers may differ, since they are measured on other tokens."""
    errors = [_error_of(site) for site in run[0].fp4_report.recipe.sites.values()]
    both, weight, activation = (sum(values) for values in zip(*errors, strict=True))
    assert 0 < weight < both
    assert 0 < activation < both
    assert both < 1.5 * (weight + activation)


def test_without_activation_quantization_all_error_is_the_weights() -> None:
    model = fp4compile.quantize(
        tiny_llama(layers=1), [tokens()], "w4a16", method="minmax", progress=False
    )
    for site in model.fp4_report.recipe.sites.values():
        _, weight, activation = _error_of(site)
        assert weight > 0
        # With nothing rounded only the order of a sum can differ.
        assert activation < 1e-9


def test_channel_maxima_are_those_of_the_activation() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(5, 6) * torch.tensor([1.0, 2, 4, 8, 16, 32])
    fp4compile.quantize(model, [x], method="minmax", progress=False)
    (site,) = model.fp4_report.recipe.sites.values()
    assert torch.equal(site.diagnosis.channel_absmax, x.abs().amax(dim=0))
    (row,) = page_of(model.fp4_report).rows
    assert row.channels.before == pytest.approx(x.abs().amax(dim=0).sort().values, rel=1e-3)
    assert row.channels.channels == 6


def _row(name: str, error: float, elements: int) -> Row:
    return Row(
        name, "k", 0, (elements, 1), "e2m1", None, None, 1, None, 4.0, error, error,
        None, None, None, None,
    )  # fmt: skip


def test_the_curve_takes_first_what_gains_most_per_bit_and_ends_without_error() -> None:
    rows = (_row("small error", 0.1, 10), _row("large", 0.5, 1000), _row("cheap", 0.4, 10))
    points = sensitivity_curve(rows)
    assert [point.name for point in points] == [None, "cheap", "small error", "large"]
    assert points[0].bits == 4
    assert points[-1].bits == pytest.approx(16)
    assert points[-1].mean_error == pytest.approx(0)
    assert [p.mean_error for p in points] == sorted((p.mean_error for p in points), reverse=True)


def test_a_page_of_nothing_quantized_has_no_figures(page: Page, tmp_path: Path) -> None:
    model = fp4compile.quantize(
        nn.Sequential(nn.Linear(6, 4)), [torch.randn(5, 6)], "w4a16", method="minmax"
    )
    write_page(model.fp4_report, tmp_path / "one.html")
    assert "Nothing was left out" in (tmp_path / "one.html").read_text()


@pytest.mark.parametrize("place", ["nowhere/report.html", "."])
def test_a_place_that_cannot_be_written_is_told_before_calibrating(
    place: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ReportError, match="directory that exists"):
        fp4compile.quantize(model, [torch.randn(5, 6)], report=tmp_path / place)
    assert not hasattr(model, "fp4_report")


def test_a_recipe_of_an_older_version_has_no_report(run: tuple[nn.Module, Path]) -> None:
    with pytest.raises(ReportError, match="older version"):
        page_of(replace(run[0].fp4_report.recipe, report={}))


@pytest.mark.parametrize("value", [0.5, 0.0123, 3e-5, 1.0])
def test_percents_keep_two_digits(value: float) -> None:
    assert float(percent(value).rstrip("%")) == pytest.approx(100 * value, rel=0.05)


@pytest.mark.parametrize("scale", [Scale(0, 7.3, 10, 200), log_scale([0.003, 40], 200, 10)])
def test_ticks_lie_within_the_range_and_scales_hit_their_ends(scale: Scale) -> None:
    assert 2 <= len(scale.ticks()) <= 8
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert (scale(scale.low), scale(scale.high)) == (scale.start, scale.end)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200], ids=["narrow", "wide"])
def test_a_browser_shows_it_without_overflow_or_errors(
    run: tuple[nn.Module, Path], width: int, tmp_path: Path
) -> None:
    """The page measures itself in a frame of that width: headless windows have a least width."""
    probe = tmp_path / "probe.html"
    shutil.copy(run[1], tmp_path / "report.html")
    probe.write_text(
        f"<iframe id=f src=report.html style='width:{width}px;height:900px;border:0'></iframe>"
        "<pre id=out></pre><script>f.onload=()=>{const d=f.contentDocument;"
        "const t=d.querySelector('#weights th:nth-child(10)');t.click();t.click();"
        "const c=d.querySelector('[data-tip]');"
        "c.dispatchEvent(new PointerEvent('pointermove',{bubbles:true,clientX:5,clientY:5}));"
        "out.textContent=JSON.stringify([d.documentElement.scrollWidth,"
        "d.querySelector('#weights tbody tr td').textContent,"
        "d.getElementById('tip').textContent===c.dataset.tip,d.getElementById('tip').hidden])}"
        "</script>"
    )
    dom = subprocess.run(
        ["chromium", *BROWSER_OPTIONS, "--dump-dom", f"file://{probe}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    found = re.search(r'<pre id="out">(.*?)</pre>', dom)
    assert found
    scroll_width, first, tip_is_shown, tip_is_hidden = json.loads(found[1])
    assert scroll_width <= width
    worst = max(page_of(run[0].fp4_report).rows, key=lambda row: row.error)
    assert first == worst.name
    assert tip_is_shown
    assert not tip_is_hidden
