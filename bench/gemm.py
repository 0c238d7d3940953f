"""One linear layer in 4, 6 and 8 bits (activation quantization included) beside bf16, fp32 and, on
CPUs, other libraries' 4-bit layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp4compile
from bench import gemm_peers
from bench.peak import peak_call
from bench.timing import Timing, interleave
from fp4compile.blocks import SECOND_FORMAT
from fp4compile.formats import by_name
from fp4compile.packing import pack
from fp4compile.tensor import FP4Tensor

# Together larger than any last-level cache, so that decode reads weights from memory.
WORKING_SET_BYTES = 128 << 20
# From here on a layer is bound by arithmetic, and one weight is enough.
MANY_ROWS = 64
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
    weights are read over what ``torch.sum`` reads in the same run, ``peak_share`` the rate of
    operations over that of ``peak_call``'s loop in the same run (None: no such instruction).
    """

    name: str
    M: int
    N: int
    K: int
    threads: int
    timing: Timing
    gops: float
    bandwidth_share: float
    peak_share: float | None
    device: str = "cpu"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class _Layers:
    """``count`` layers of one shape; ``given(x)`` of M rows makes what ``call`` takes."""

    count: int
    call: Callable[[Any], object]
    given: Callable[[Tensor], Any]

    def prepared(self, M: int, K: int) -> tuple[Callable[[], object], int]:
        """A call of as many layers as are measured at ``M`` rows, and how many these are."""
        count = self.count if M < MANY_ROWS else 1
        return partial(self.call, [self.given(torch.randn(M, K)) for _ in range(count)]), count


class _Stack(nn.Module):
    """Layers beside each other, each with an activation of its own, so that nothing is shared but
    what one call of a compiled graph costs, as in a model. Fewer activations, fewer layers.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        held = (nn.Parameter(weight, requires_grad=False) for weight in weights)
        self.weights = nn.ParameterList(held)

    def forward(self, *activations: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, w) for x, w in zip(activations, self.weights, strict=False))


def run(
    shapes: list[tuple[int, int]],
    rows: list[int],
    threads: int,
    repetitions: int,
    device: str = "cpu",
) -> Iterator[GemmResult]:
    """Results for every shape (N, K) and M, all candidates of one M in one interleaved run."""
    torch.set_num_threads(threads)
    peak = peak_call(threads) if device == "cpu" else None
    with torch.device(device), torch.no_grad():
        # A GPU's caches hold more.
        buffer = torch.ones(BANDWIDTH_FLOATS * (1 if device == "cpu" else 8))
        roofs: dict[str, Callable[[], object]] = {"read": buffer.sum}
        if peak is not None:
            roofs["peak"] = peak[0]
        for N, K in shapes:
            layers = _layers(N, K, device)
            if device == "cpu":
                layers |= _peers(N, K, threads)
            for M in rows:
                prepared = {name: each.prepared(M, K) for name, each in layers.items()}
                calls = roofs | {name: call for name, (call, _) in prepared.items()}
                if device != "cpu":
                    calls = {name: _captured(call) for name, call in calls.items()}
                timings = interleave(
                    calls,
                    repetitions=repetitions,
                    finish=_nothing if device == "cpu" else torch.cuda.synchronize,
                )
                bandwidth = buffer.nbytes / timings["read"].median
                gops = None if peak is None else peak[1] / timings["peak"].median / 1e9
                for name, (_, count) in prepared.items():
                    timing = timings[name].of_each(count)
                    yield _result(name, M, N, K, threads, timing, bandwidth, gops, device)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The kernels of ``call`` as a CUDA graph: to launch many of them takes longer than they do."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _nothing() -> None:
    pass


def _result(
    name: str,
    M: int,
    N: int,
    K: int,
    threads: int,
    timing: Timing,
    bandwidth: float,
    peak_gops: float | None,
    device: str,
) -> GemmResult:
    share = N * K * WEIGHT_BITS.get(name, 4) / 8 / timing.median / bandwidth
    gops = 2 * M * N * K / timing.median / 1e9
    peak_share = None if peak_gops is None else gops / peak_gops
    return GemmResult(name, M, N, K, threads, timing, gops, share, peak_share, device)


def _layers(N: int, K: int, device: str) -> dict[str, _Layers]:
    """Our own ways to compute the layer, and torch's in high precision."""
    copies = _copies(N, K)
    wide = {
        name: [_weight(N, K, name[-4:], name[-4:]) for _ in range(max(1, copies // 2))]
        for name in ("w6a6 e2m3", "w8a8 e1m6", "w8a8 e4m3")
        if device == "cpu"  # the only one with kernels for them
    }
    ours = {
        "fp4 w4a4": [_weight(N, K, "e2m1", "e2m1") for _ in range(copies)],
        "fp4 w4a4 block 32": [_fp4_blocks(N, K) for _ in range(copies)],
        "fp4 w4a16": [_weight(N, K, "e2m1", None) for _ in range(copies)],
        **wide,
    }
    full = torch.randn(N, K)
    bf16 = [full.to(torch.bfloat16) for _ in range(max(1, copies // 4))]
    fp32 = [full.clone() for _ in range(max(1, copies // 8))]
    torch.compiler.reset()
    return {
        **{name: _compiled(weights) for name, weights in ours.items()},
        "bf16": _one_by_one([partial(F.linear, weight=w) for w in bf16], gemm_peers.as_bfloat16),
        "fp32": _one_by_one([partial(F.linear, weight=w) for w in fp32], _as_it_is),
    }


def _compiled(weights: Sequence[Tensor]) -> _Layers:
    stack = fp4compile.compile_model(_Stack(weights).eval())
    given = gemm_peers.as_bfloat16 if weights[0].dtype == torch.bfloat16 else _as_it_is
    return _Layers(len(weights), lambda activations: stack(*activations), given)


def _one_by_one(
    layers: Sequence[Callable[[Any], object]], given: Callable[[Tensor], Any]
) -> _Layers:
    def call(activations: Sequence[Any]) -> None:
        for layer, x in zip(layers, activations, strict=False):
            layer(x)

    return _Layers(len(layers), call, given)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _copies(N: int, K: int) -> int:
    """How many weights of 4 bits are the working set."""
    return max(1, WORKING_SET_BYTES // (N * K // 2))


def _peers(N: int, K: int, threads: int) -> dict[str, _Layers]:
    """Those that are installed, each with as many weights as are larger than the caches."""

    def layers(peer: gemm_peers.GemmPeer) -> _Layers:
        return _one_by_one([peer.make(N, K, threads) for _ in range(_copies(N, K))], peer.given)

    known = gemm_peers.GEMM_PEERS.items()
    return {name: layers(peer) for name, peer in known if gemm_peers.absent(name) is None}


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
