"""One compiled kernel: its texts, its resources, its instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """A Triton kernel in one configuration; ``cubin`` runs on the GPU that it was compiled for.

    ``shared_memory`` bytes per block; ``configuration`` the tile sizes and what else was tunable.
    """

    name: str
    configuration: str
    num_warps: int
    shared_memory: int
    ttgir: str
    ptx: str
    cubin: bytes

    @cached_property
    def registers(self) -> int:
        """Registers per thread."""
        return self._resources[0]

    @cached_property
    def local_memory(self) -> int:
        """Bytes per thread beside the registers: what was spilled, and arrays (as in ``sin``)."""
        return self._resources[1] + self._resources[3]

    @cached_property
    def _resources(self) -> tuple[int, ...]:
        text = self._tool("cuobjdump", "--dump-resource-usage")
        (found,) = _RESOURCES.findall(text)
        return tuple(map(int, found))

    @cached_property
    def sass(self) -> str:
        """The disassembly."""
        return self._tool("cuobjdump", "--dump-sass")

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each machine instruction stands in the kernel, modifiers included."""
        return Counter(_SASS.findall(self.sass))

    def _tool(self, name: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(_TOOLS / name), option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def machine_code(result: Any) -> MachineCode:
    """From what Inductor's autotuner holds of one configuration."""
    kernel = result.kernel
    return MachineCode(
        name=kernel.metadata.name,
        configuration=str(result.config),
        num_warps=kernel.metadata.num_warps,
        shared_memory=kernel.metadata.shared,
        ttgir=kernel.asm["ttgir"],
        ptx=kernel.asm["ptx"],
        cubin=kernel.asm["cubin"],
    )
