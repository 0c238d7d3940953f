"""The command line: which commands there are, and how they end.

Exit codes: 0 done; 1 a mistake, told in one message on stderr; 2 wrong usage (unknown options);
3 done, but a check found something broken; 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import fp4compile
from fp4compile.commands import bench, demo, doctor, evaluate, generate, inspect, quantize, report
from fp4compile.errors import Fp4CompileError

MISTAKE, INTERRUPTED = 1, 130

# Name -> function and the examples below its help.
COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "quantize": (quantize.command, quantize.EXAMPLES),
    "eval": (evaluate.command, evaluate.EXAMPLES),
    "generate": (generate.command, generate.EXAMPLES),
    "chat": (generate.chat, generate.CHAT_EXAMPLES),
    "inspect": (inspect.command, inspect.EXAMPLES),
    "bench": (bench.command, bench.EXAMPLES),
    "report": (report.command, report.EXAMPLES),
    "doctor": (doctor.command, doctor.EXAMPLES),
    "demo": (demo.command, ""),
}

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
for _name, (_function, _examples) in COMMANDS.items():
    app.command(_name, epilog=_examples, no_args_is_help=_name not in ("doctor", "demo"))(_function)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fp4compile {fp4compile.__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also log what is decided, to stderr.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Quantizes PyTorch models to 4-bit floating point and compiles them.

    Exit codes: 0 done; 1 a mistake, told on stderr; 2 wrong usage; 3 a check found a fault.
    """
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("fp4compile").setLevel(logging.INFO)


def main() -> None:
    """Entry point of ``fp4compile`` and ``python -m fp4compile``."""
    try:
        app(prog_name="fp4compile")  # also under python -m
    except Fp4CompileError as error:
        print(f"fp4compile: error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("fp4compile: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
