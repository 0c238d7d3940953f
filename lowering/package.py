"""AOTInductor packages: compile an exported program into one file, load it again."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package

KEY = "fp4compile"


def compile_package(
    exported: torch.export.ExportedProgram, path: Path, about: dict[str, Any]
) -> str:
    """Write ``exported`` compiled to ``path``, with ``about`` in it; returns the generated code."""
    aoti_compile_and_package(
        exported,
        package_path=str(path),
        inductor_configs={"aot_inductor.metadata": {KEY: json.dumps(about)}},
    )
    with zipfile.ZipFile(path) as file:
        sources = [name for name in file.namelist() if name.endswith(".cpp")]
        return "\n".join(file.read(name).decode() for name in sources)


def load_package(path: Path) -> Callable[..., Any]:
    """The compiled program in ``path``."""
    return aoti_load_package(str(path))
