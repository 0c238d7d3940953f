"""The report as one self-contained HTML page: no network, no library in the browser."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fp4compile.errors import ReportError
from fp4compile.page.build import page_of, speeds
from fp4compile.page.content import Page
from fp4compile.page.render import render
from fp4compile.recipe import Recipe
from fp4compile.report import Report
from fp4compile.timing import Benchmark


def write_page(
    source: Report | Recipe | Page, path: str | Path, benchmarks: Sequence[Benchmark] = ()
) -> Page:
    """Write the page of a report, or of what a run saved of it, to ``path``.

    Args:
        benchmarks: results of ``fp4compile.benchmark`` on this model, for its speed by input.

    Returns:
        What the page shows, as plain values (``Page.to_dict`` is its JSON).

    Raises:
        ReportError: the recipe has no report (an older version made it), a benchmark has no
            baseline, or ``path`` cannot be written.
    """
    if isinstance(source, Page):
        page = replace(source, speed=speeds(benchmarks))
    else:
        page = page_of(source, benchmarks)
    partial = Path(f"{path}.{os.getpid()}.partial")  # processes that calibrate together all write
    try:
        partial.write_text(render(page), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ReportError(f"cannot write the report to {path}: {error}") from error
    return page


def check_writable(path: str | Path) -> None:
    """Fail before minutes of calibration, not after them.

    Raises:
        ReportError: ``path`` lies in no directory, or is one.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ReportError(
            f"report={str(path)!r} is no file that can be written; name an .html file in a "
            "directory that exists"
        )


__all__ = ["Page", "check_writable", "page_of", "write_page"]
