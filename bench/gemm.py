"""One linear layer in 4, 6 and 8 bits (activation quantization included) beside bf16, fp32 and, on
CPUs, other libraries' 4-bit layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fp4compile
from bench import gemm_peers
from bench.timing import Timing, interleave
from fp4compile.blocks import SECOND_FORMAT
from fp4compile.formats import by_name
from fp4compile.packing import pack
from fp4compile.tensor import FP4Tensor

# Together larger than any last-level cache, so that decode reads weights from memory.
WORKING_SET_BYTES = 128 << 20
BANDWIDTH_FLOATS = 64 << 20
BLOCK_SIZE, ROTATION, BLOCK_CLIP = 32, 64, 0.85
# Where it is not 4.
WEIGHT_BITS = {
    "fp4 w4a4 block 32": 4 + 8 / BLOCK_SIZE,
    "w6a6 e2m3": 6,
    "w8a8 e1m6": 8,
    "w8a8 e4m3": 8,
    "bf16": 16,
    "fp32": 32,
    **dict.fromkeys(gemm_peers.GEMM_PEERS, gemm_peers.BITS),
}


@dataclass(frozen=True)
class GemmResult:
    """``y[M, N] = x[M, K] w[N, K]^T`` in one way; ``bandwidth_share`` is the rate at which the
    weights are read over what ``torch.sum`` reads in the same run.
    """

    name: str
    M: int
    N: int
    K: int
    threads: int
    timing: Timing
    gops: float
    bandwidth_share: float
    device: str = "cpu"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def run(
    shapes: list[tuple[int, int]],
    rows: list[int],
    threads: int,
    repetitions: int,
    device: str = "cpu",
) -> Iterator[GemmResult]:
    """Results for every shape (N, K) and M, all candidates of one M in one interleaved run."""
    torch.set_num_threads(threads)
    fp4compile.load_lowerings()
    # Dynamo counts every candidate, and M = 1 apart, against one limit.
    with torch.device(device), torch._dynamo.config.patch(recompile_limit=32):
        # A GPU's caches hold more.
        buffer = torch.ones(BANDWIDTH_FLOATS * (1 if device == "cpu" else 8))
        for N, K in shapes:
            layers = _layers(N, K, device)
            if device == "cpu":
                layers |= _peers(N, K, threads)
            for M in rows:
                x = torch.randn(M, K)
                calls = {name: make(x) for name, make in layers.items()}
                timings = interleave(
                    {**calls, "read": buffer.sum},
                    repetitions=repetitions,
                    finish=_nothing if device == "cpu" else torch.cuda.synchronize,
                )
                bandwidth = buffer.nbytes / timings["read"].median
                for name in calls:
                    yield _result(name, M, N, K, threads, timings[name], bandwidth, device)


def _nothing() -> None:
    pass


def _result(
    name: str, M: int, N: int, K: int, threads: int, timing: Timing, bandwidth: float, device: str
) -> GemmResult:
    rate = N * K * WEIGHT_BITS.get(name, 4) / 8 / timing.median
    gops = 2 * M * N * K / timing.median / 1e9
    return GemmResult(name, M, N, K, threads, timing, gops, rate / bandwidth, device)


def _layers(N: int, K: int, device: str) -> dict[str, Callable[[Tensor], Callable[[], object]]]:
    """Ways to compute the layer; each takes x and gives a call that walks through its weights."""
    copies = _copies(N, K)
    w4a4 = [_weight(N, K, "e2m1", "e2m1") for _ in range(copies)]
    blocks = [_fp4_blocks(N, K) for _ in range(copies)]
    w4a16 = [_weight(N, K, "e2m1", None) for _ in range(copies)]
    wide = {
        name: [_weight(N, K, name[-4:], name[-4:]) for _ in range(max(1, copies // 2))]
        for name in ("w6a6 e2m3", "w8a8 e1m6", "w8a8 e4m3")
        if device == "cpu"  # the only one with kernels for them
    }
    full = torch.randn(N, K)
    bf16 = [full.to(torch.bfloat16) for _ in range(max(1, copies // 4))]
    fp32 = [full.clone() for _ in range(max(1, copies // 8))]
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w: F.linear(x, w), dynamic=True, fullgraph=True)
    return {
        "fp4 w4a4": partial(_walk, compiled, w4a4),
        "fp4 w4a4 block 32": partial(_walk, compiled, blocks),
        "fp4 w4a16": lambda x: _walk(compiled, w4a16, x.to(torch.bfloat16)),
        **{name: partial(_walk, compiled, weights) for name, weights in wide.items()},
        "bf16": lambda x: _walk(F.linear, bf16, x.to(torch.bfloat16)),
        "fp32": partial(_walk, F.linear, fp32),
    }


def _copies(N: int, K: int) -> int:
    """How many weights of 4 bits are the working set."""
    return max(1, WORKING_SET_BYTES // (N * K // 2))


def _peers(N: int, K: int, threads: int) -> dict[str, Callable[[Tensor], Callable[[], object]]]:
    """Those that are installed, each with as many weights as are larger than the caches."""

    def walker(peer: gemm_peers.GemmPeer) -> Callable[[Tensor], Callable[[], object]]:
        layers = [peer.make(N, K, threads) for _ in range(_copies(N, K))]
        return lambda x: _walk(lambda given, layer: layer(given), layers, peer.given(x))

    known = gemm_peers.GEMM_PEERS.items()
    return {name: walker(peer) for name, peer in known if gemm_peers.absent(name) is None}


def _walk(
    linear: Callable[[Any, Any], object], weights: Sequence[object], x: object
) -> Callable[[], object]:
    position = 0

    def call() -> object:
        nonlocal position
        position = (position + 1) % len(weights)
        return linear(x, weights[position])

    return call


def _weight(N: int, K: int, format: str, activation: str | None) -> Tensor:
    bits = by_name(format).bits
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    scale = torch.tensor(3.0 / by_name(activation).max_integer) if activation else None
    return FP4Tensor(
        pack(codes, bits),
        torch.rand(N) + 0.1,
        scale,
        weight_format=format,
        activation_format=activation,
        reduction=K,
        dtype=torch.float32 if activation else torch.bfloat16,
    )


def _fp4_blocks(N: int, K: int) -> Tensor:
    """As method "best" makes them: two formats, two maxima, rotated."""
    scales = torch.randint(40, 80, (N, K // BLOCK_SIZE), dtype=torch.uint8)
    flags = SECOND_FORMAT * torch.randint(0, 2, scales.shape, dtype=torch.uint8)
    return FP4Tensor(
        pack(torch.randint(0, 16, (N, K), dtype=torch.uint8), 4),
        torch.ones(1),
        torch.tensor(0.01),
        None,
        scales | flags,
        weight_format="e2m1|e1m2",
        activation_format="e2m1|e1m2",
        granularity="block",
        rotation=ROTATION,
        block_size=BLOCK_SIZE,
        block_clip=BLOCK_CLIP,
        reduction=K,
        dtype=torch.float32,
    )
