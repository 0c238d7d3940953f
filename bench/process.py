"""A measurement in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any


def run_module(module: str, *arguments: object) -> dict[str, Any]:
    """The JSON object that ``python -m module arguments`` prints last."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
