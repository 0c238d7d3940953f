"""The generated C++ touches nothing outside its tensors and does nothing undefined."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from fp4compile.blocks import block_count
from fp4compile.formats import alternatives
from fp4compile.lowering.testing.standalone import Kernel, Layer, build, kernels_of
from fp4compile.packing import packed_size

BF16, FP32 = torch.bfloat16, torch.float32
# Every text of every target, on sizes that fill no tile; a row of weights ends with the buffer.
LAYERS = (
    Layer("cpp_amx", 67, 131, "e2m1"),  # all but its tiles is cpp_avx512's
    Layer("cpp_avx512", 33, 233, "e2m3", bias=True),
    Layer("cpp_avx512", 35, 259, "e4m3", BF16),
    Layer("cpp_avx512", 21, 333, "e2m1|e1m2", granularity="block", block_size=32),
    Layer("cpp_avx512", 19, 135, "e2m1|e1m2", FP32, None, 16),
    Layer("cpp_avx2", 37, 131, "e3m0"),
    Layer("cpp_avx2", 5, 77, "e2m3|e1m4", granularity="block", block_size=16),
    Layer("cpp_avx2", 6, 211, "e2m1|e1m2", granularity="block", block_size=32),
    Layer("cpp_avx2", 9, 83, "e1m6"),
    Layer("cpp_avx2", 7, 45, "e4m3", BF16),
    Layer("cpp_neon", 13, 133, "e2m1|e1m2", granularity="block", block_size=32),
    Layer("cpp_neon", 11, 75, "e2m3"),
    Layer("cpp_portable", 18, 67, "e2m3"),
    Layer("cpp_portable", 17, 71, "e2m1|e1m2", granularity="block", block_size=16),
)
ROWS = (0, 1, 3, 7, 35, 401)
# What the address sanitizer finds as well, at twice the time to compile.
LEFT_OUT = "null,object-size,pointer-overflow,vptr"
HARNESS = """
#include <random>
#include <vector>

std::mt19937 draw(0);

// Of the heap, and exactly as long as the tensor, so that the sanitizer sees the first byte beyond.
template <typename T>
std::vector<T> tensor(int64_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = static_cast<T>(static_cast<float>(draw() % 127));
    values.shrink_to_fit();
    return values;
}
"""


def call(kernel: Kernel) -> str:
    """C++ that runs ``kernel`` on random tensors of M rows."""
    layer = kernel.layer
    bits = alternatives(layer.format)[0].bits
    blocks = block_count(layer.K, layer.block_size) if layer.block_size else 0
    counts = {
        "operand": f"M * {layer.K}",
        "operand_scale": {"token": "M", "block": f"M * {blocks}"}.get(layer.granularity or ""),
        "packed_weight": str(layer.N * packed_size(layer.K, bits)),
        "weight_scale": "1" if blocks else str(layer.N),
        "block_scale": str(layer.N * blocks),
        "bias": str(layer.N),
        "result": f"M * {layer.N}",
    }
    values = [
        f"tensor<{kind.removeprefix('const ').rstrip('*')}>({counts[name]}).data()"
        if kind.endswith("*")
        else "M"
        for kind, name in kernel.arguments
    ]
    return f"{kernel.name}({', '.join(values)});"


def program(kernels: list[Kernel]) -> str:
    texts = "\n".join(kernel.text for kernel in kernels)
    rows = ", ".join(map(str, ROWS))
    calls = "\n".join(map(call, kernels))
    return f"{texts}\n{HARNESS}\nint main() {{ for (int64_t M : {{{rows}}}) {{\n{calls}\n}} }}\n"


@pytest.mark.slow
def test_generated_code_under_sanitizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernels_of([layer for layer in LAYERS if layer.served])
    flags = ["-O1", "-fsanitize=address,undefined", f"-fno-sanitize={LEFT_OUT}"]
    # Here NEON's dot product, in the other tests what stands in for it.
    flags += ["-fno-sanitize-recover=all", "-D__ARM_FEATURE_DOTPROD=1"]
    binary = build(tmp_path, program(kernels), shared=False, flags=flags)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    # What libgomp keeps until the end of the process is no leak of ours.
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    done = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
