"""What a command says: text or JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

STDOUT = Path("-")
# Not the terminal: a table that is piped into a file keeps its columns.
PIPED_WIDTH = 120


def emit(result: Mapping[str, Any], text: RenderableType, json_path: Path | None) -> None:
    """Print ``text``, and write ``result`` where ``--json`` says; '-' prints it instead."""
    if json_path == STDOUT:
        print(to_json(result))
        return
    if json_path is not None:
        json_path.write_text(to_json(result) + "\n", encoding="utf-8")
    console().print(text)


def to_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, default=str)


def console() -> Console:
    """Made anew each time, since tests and pipes replace stdout."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def working(what: str) -> AbstractContextManager[object]:
    """A spinner on stderr while something long goes on; nothing where stderr is no terminal."""
    return Console(stderr=True).status(what)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the one look of all commands; a column ending in '>' is right-aligned."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left")
    return made
