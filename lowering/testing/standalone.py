"""CPU kernels of fp4::linear without Inductor around them: many in one library, which compiles in
seconds, or in a program of their own.
"""

from __future__ import annotations

import ctypes
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa

from fp4compile import lowering
from fp4compile.blocks import SECOND_FORMAT, block_count
from fp4compile.formats import alternatives
from fp4compile.lowering.problem import GemmProblem
from fp4compile.lowering.targets import CPU_TARGETS, cpp_amx, cpp_neon
from fp4compile.packing import pack

# Where there is no AMX its few instructions are emulated, and so are NEON's.
EMULATES_TILES = not torch.cpu._init_amx()
EMULATES_NEON = cpp_neon.without_neon() is not None
_TILES = Path(__file__).with_name("amx_emulation.h")
_NEON = Path(__file__).with_name("neon_emulation.h")
_SIGNATURE = re.compile(r"void kernel\((.*?)\)", re.DOTALL)


@dataclass(frozen=True)
class Layer:
    """One linear layer of random weights, on a CPU target."""

    target: str
    N: int
    K: int
    format: str
    operand: torch.dtype = torch.int8
    granularity: str | None = "token"
    block_size: int = 0
    bias: bool = False
    operand_format: str = ""  # whose integers the operand holds, "" for all of int8

    def __str__(self) -> str:
        operand = str(self.operand).removeprefix("torch.")
        blocks = f"-blocks{self.block_size}" if self.block_size else ""
        return f"{self.target}-{self.format}-{operand}-{self.granularity}{blocks}-{self.N}x{self.K}"

    @property
    def problem(self) -> GemmProblem:
        """What the target is asked for."""
        return GemmProblem(
            N=self.N,
            K=self.K,
            weight_format=self.format,
            operand_dtype=self.operand,
            operand_scale=self.granularity,
            block_size=self.block_size,
            bias=self.bias,
            out_dtype=torch.float32,
            operand_format=self.operand_format,
        )

    @property
    def served(self) -> bool:
        """Whether the target has a kernel for it on this CPU."""
        (target,) = (target for target in CPU_TARGETS if target.name == self.target)
        with _emulation():
            return target.supports(self.problem) is None

    def weights(self) -> dict[str, Tensor]:
        """Weight, scales and bias as fp4::linear names them; the same at every call."""
        generator = torch.Generator().manual_seed(self.N * 8191 + self.K)
        fmt = alternatives(self.format)[0]
        codes = torch.randint(0, 2**fmt.bits, (self.N, self.K), generator=generator)
        found = {"packed_weight": pack(codes.to(torch.uint8), fmt.bits)}
        if self.block_size:
            shape = (self.N, block_count(self.K, self.block_size))
            scales = torch.randint(1, 127, shape, generator=generator)
            if "|" in self.format:
                scales |= SECOND_FORMAT * torch.randint(0, 2, shape, generator=generator)
            found["block_scale"] = scales.to(torch.uint8)
            found["weight_scale"] = torch.tensor([0.25])
        else:
            found["weight_scale"] = torch.rand(self.N, generator=generator) + 0.1
        if self.bias:
            found["bias"] = torch.randn(self.N, generator=generator)
        return found

    def operands(self, M: int) -> dict[str, Tensor]:
        """An operand of M rows with its scale."""
        largest = self.problem.largest_operand
        operand = torch.randint(-largest, min(largest + 1, 128), (M, self.K)).to(self.operand)
        scale = {
            "tensor": lambda: torch.rand(()),
            "token": lambda: torch.rand(M, 1),
            "block": lambda: torch.rand(M, block_count(self.K, self.block_size)),
            None: lambda: None,
        }[self.granularity]()
        return {"operand": operand} | ({} if scale is None else {"operand_scale": scale})

    def eager(self, tensors: dict[str, Tensor]) -> Tensor:
        """fp4::linear, which torch.compile lowers."""
        result: Tensor = torch.ops.fp4.linear(
            tensors["operand"],
            tensors.get("operand_scale"),
            tensors["packed_weight"],
            tensors["weight_scale"],
            tensors.get("bias"),
            self.format,
            torch.float32,
            tensors.get("block_scale"),
            self.block_size,
            self.operand_format,
        )
        return result


@dataclass(frozen=True)
class Kernel:
    """The text of a layer's kernel: a function ``name`` of ``arguments``, type and name in C++."""

    layer: Layer
    name: str
    text: str
    arguments: tuple[tuple[str, str], ...]


@contextmanager
def _emulation() -> Iterator[None]:
    """Targets find AMX and NEON, or the emulation that :func:`build` puts in their place."""
    with ExitStack() as stack:
        if EMULATES_TILES:
            stack.enter_context(patch.object(cpp_amx, "without_tiles", lambda problem: None))
        if EMULATES_NEON:
            stack.enter_context(patch.object(cpp_neon, "without_neon", lambda: None))
        yield


def kernels_of(layers: Sequence[Layer]) -> list[Kernel]:
    """What Inductor would compile for ``layers``; the number of rows is an argument."""
    by_target: dict[str, list[Layer]] = {}
    for layer in layers:
        by_target.setdefault(layer.target, []).append(layer)
    return [kernel for some in by_target.values() for kernel in _kernels_of_target(some)]


def _kernels_of_target(layers: Sequence[Layer]) -> Iterator[Kernel]:
    # One graph: tracing takes longer than lowering.
    texts: list[str] = []

    def keep(_: Any, types: Any, text: str, **__: Any) -> Any:
        texts.append(text)
        return lambda *arguments: None

    inputs = [layer.weights() | layer.operands(3) for layer in layers]
    for layer, tensors in zip(layers, inputs, strict=True):
        torch._dynamo.mark_dynamic(tensors["operand"], 0)
        if layer.granularity in ("token", "block"):
            torch._dynamo.mark_dynamic(tensors["operand_scale"], 0)

    def run(inputs: list[dict[str, Tensor]]) -> list[Tensor]:
        return [layer.eager(tensors) for layer, tensors in zip(layers, inputs, strict=True)]

    torch._dynamo.reset()
    with (
        _emulation(),
        patch.object(lowering.config, "cpu_target", layers[0].target),
        patch.object(AsyncCompile, "cpp_pybinding", keep),
        inductor_config.patch(force_disable_caches=True),
    ):
        torch.compile(run, fullgraph=True)(inputs)
    for layer in layers:
        # The comment that tells what a kernel is.
        (text,) = (text for text in texts if f"linear N={layer.N} K={layer.K} " in text)
        yield _kernel(layer, text)


def _kernel(layer: Layer, text: str) -> Kernel:
    name = f"{layer.target}_{layer.N}_{layer.K}"
    signature = _SIGNATURE.search(text)
    assert signature is not None
    arguments = (argument.strip().rsplit(maxsplit=1) for argument in signature[1].split(","))
    return Kernel(
        layer,
        name,
        text.replace("kernel_gemm", f"{name}_gemm").replace("void kernel(", f"void {name}("),
        tuple((kind, argument) for kind, argument in arguments),
    )


def build(folder: Path, text: str, *, shared: bool, flags: Sequence[str] = ()) -> Path:
    """Compile ``text`` as Inductor compiles kernels, then with ``flags``."""
    source = folder / "kernels.cpp"
    source.write_text(text)
    how = CppTorchOptions(vec_isa=pick_vec_isa())
    builder = CppBuilder("kernels", [str(source)], how, output_dir=str(folder))
    compiler, *options = shlex.split(builder.get_command_line())
    if EMULATES_TILES:
        options += ["-DFP4_EMULATE_AMX", "-include", str(_TILES)]
    if EMULATES_NEON:
        options += ["-include", str(_NEON)]
    if not shared:
        options.remove("-shared")
        # Kernels need nothing of torch but its headers, and its libraries need Python.
        options.insert(0, "-Wl,--as-needed")
    built = subprocess.run([compiler, *options, *flags], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return Path(builder.get_target_file_path())


class Library:
    """Kernels that are called with tensors."""

    def __init__(self, folder: Path, layers: Sequence[Layer]) -> None:
        kernels = kernels_of(layers)
        self.kernels = {kernel.layer: kernel for kernel in kernels}
        text = "\n".join(kernel.text for kernel in kernels)
        self.library = ctypes.CDLL(str(build(folder, text, shared=True, flags=["-O1"])))

    def run(self, layer: Layer, tensors: dict[str, Tensor]) -> Tensor:
        """The layer's result by its kernel."""
        kernel = self.kernels[layer]
        M = len(tensors["operand"])
        result = torch.full((M, layer.N), torch.nan)
        tensors = {**tensors, "result": result}
        arguments: list[Any] = [
            ctypes.c_void_p(tensors[name].data_ptr()) if kind.endswith("*") else ctypes.c_int64(M)
            for kind, name in kernel.arguments
        ]
        self.library[kernel.name](*arguments)
        return result
