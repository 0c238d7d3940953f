"""One compiled kernel: its texts, its resources, its instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);", re.MULTILINE
)
_BRANCH_TARGET = re.compile(r"\b0x([0-9a-f]+)")
_AMDGCN = re.compile(r"^\t([a-z]+_[a-z0-9_]+)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """A Triton kernel in one configuration.

    ``texts``: ``ttgir``; ``ptx`` or ``amdgcn``. ``binary`` is what runs, a cubin or an hsaco.
    ``shared_memory`` bytes per block; ``configuration`` the tile sizes and what else was tunable.
    """

    name: str
    configuration: str
    num_warps: int
    shared_memory: int
    texts: Mapping[str, str]
    binary: bytes

    @property
    def assembly(self) -> str:
        """PTX, or AMD's."""
        return self.texts["ptx"] if self.is_nvidia else self.texts["amdgcn"]

    @property
    def is_nvidia(self) -> bool:
        return "ptx" in self.texts

    @property
    def registers(self) -> int:
        """Vector registers per thread."""
        return self._resources[0]

    @property
    def local_memory(self) -> int:
        """Bytes per thread beside the registers: what was spilled, and arrays (as in ``sin``)."""
        return self._resources[1]

    @cached_property
    def _resources(self) -> tuple[int, int]:
        if not self.is_nvidia:
            return self._metadata("vgpr_count"), self._metadata("private_segment_fixed_size")
        (found,) = _RESOURCES.findall(self._cuobjdump("--dump-resource-usage"))
        registers, stack, _, local = map(int, found)
        return registers, stack + local

    def _metadata(self, key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", self.assembly)
        assert found is not None
        return int(found[1])

    @cached_property
    def disassembly(self) -> str:
        """SASS; AMD's assembly is that already."""
        return self._cuobjdump("--dump-sass") if self.is_nvidia else self.assembly

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each machine instruction stands in the kernel, modifiers included."""
        if not self.is_nvidia:
            return Counter(_AMDGCN.findall(self.disassembly))
        return Counter(name for _, name, _ in _SASS.findall(self.disassembly))

    @cached_property
    def loop(self) -> Counter[str]:
        """As :attr:`instructions`, of the longest loop in SASS: between a branch and its target."""
        found = _SASS.findall(self.disassembly)
        lines = [(int(at, 16), name, operands) for at, name, operands in found]
        loops = [
            [name for at, name, _ in lines if int(target[1], 16) <= at <= end]
            for end, branch, operands in lines
            if branch.split(".")[0] == "BRA" and (target := _BRANCH_TARGET.search(operands))
        ]
        longest = max(loops, key=len)
        return Counter(longest)

    def _cuobjdump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary)
            file.flush()
            command = [str(_TOOLS / "cuobjdump"), option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def machine_code(result: Any) -> MachineCode:
    """From what Inductor's autotuner holds of one configuration."""
    kernel = result.kernel
    kinds = [kind for kind in ("ttgir", "ptx", "amdgcn") if kind in kernel.asm]
    return MachineCode(
        name=kernel.metadata.name,
        configuration=str(result.config),
        num_warps=kernel.metadata.num_warps,
        shared_memory=kernel.metadata.shared,
        texts={kind: kernel.asm[kind] for kind in kinds},
        binary=kernel.asm["cubin" if "cubin" in kernel.asm else "hsaco"],
    )
