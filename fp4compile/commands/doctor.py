"""``fp4compile doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from fp4compile.checkup import BROKEN, OK, SLOW, Check, examine
from fp4compile.commands.options import JsonPath
from fp4compile.commands.output import emit, table
from fp4compile.environment import describe_machine

EXAMPLES = """
[bold]Examples[/]

  fp4compile doctor

  fp4compile doctor --probe  # also compile a layer and compare it with eager

  fp4compile doctor --json -  # to attach to a bug report
"""
STYLES = {OK: "green", SLOW: "yellow", BROKEN: "red"}
FOUND_BROKEN = 3


def command(
    probe: Annotated[
        bool, typer.Option("--probe", help="Also compile a small layer and check its result.")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """What works on this machine, what will be slow, and the fix; exit code 3 if broken."""
    checks = examine(probe=probe)
    machine = asdict(describe_machine())
    result = {"machine": machine, "checks": [asdict(check) for check in checks]}
    emit(result, _table(checks), json_path)
    if any(check.verdict == BROKEN for check in checks):
        raise typer.Exit(FOUND_BROKEN)


def _table(checks: Sequence[Check]) -> Any:
    made = table("", "check", "found")
    for check in checks:
        style = STYLES[check.verdict]
        # As Text: brackets, as in 'fp4compile[eval]', are no markup.
        made.add_row(Text(check.verdict, style), check.name, Text(check.found))
        if check.fix:
            made.add_row("", "", Text(check.fix, "dim" if check.verdict == OK else style))
    return made
