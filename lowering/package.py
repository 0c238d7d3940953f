"""AOTInductor packages: compile an exported program into one file, load it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package

from fp4compile.lowering import inductor

KEY = "fp4compile"


def compile_package(
    exported: torch.export.ExportedProgram, path: Path, about: dict[str, Any]
) -> str:
    """Write ``exported`` compiled to ``path``, with ``about`` in it; returns the generated code."""
    codes: list[str] = []
    with inductor.saved_code(codes.append):
        aoti_compile_and_package(
            exported,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {KEY: json.dumps(about)}},
        )
    return "\n".join(codes)


def load_package(path: Path) -> Callable[..., Any]:
    """The compiled program in ``path``."""
    return aoti_load_package(str(path))
