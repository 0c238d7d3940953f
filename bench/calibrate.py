"""How calibration grows with a model: seconds and peak memory, each size in a process of its own.

The models are Llamas with random weights: what is measured is work, not accuracy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch

import fp4compile
from bench.process import peak_bytes, run_module

VOCABULARY = 8192
HEAD = 64


@dataclass(frozen=True)
class Size:
    """A Llama of ``layers`` layers of ``hidden`` channels; ``sequences`` of ``length`` tokens."""

    layers: int
    hidden: int
    sequences: int
    length: int


@dataclass(frozen=True)
class CalibrationResult:
    """``weights``: parameters that were quantized; ``peak_bytes`` of the process, of which
    ``model_bytes`` is the model in float32.
    """

    name: str
    layers: int
    hidden: int
    sequences: int
    length: int
    threads: int
    weights: int
    seconds: float
    peak_bytes: int
    model_bytes: int


def run(
    spec: str,
    method: str,
    layers: Sequence[int],
    hidden: Sequence[int],
    sequences: int,
    length: int,
    threads: int,
) -> Iterator[CalibrationResult]:
    """A result per number of layers and width."""
    for depth, width in product(layers, hidden):
        arguments = (spec, method, depth, width, sequences, length, threads)
        yield CalibrationResult(**run_module("bench.calibrate", *arguments))


def measure(spec: str, method: str, size: Size) -> CalibrationResult:
    """Quantize in this process."""
    model = _llama(size)
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (size.sequences, size.length), generator=generator)
    start = time.perf_counter()
    fp4compile.quantize(model, list(ids[:, None]), spec, method=method, progress=False)
    seconds = time.perf_counter() - start
    report = model.fp4_report
    return CalibrationResult(
        f"{spec} {method}",
        **asdict(size),
        threads=torch.get_num_threads(),
        weights=sum(model.get_parameter(site.name).numel() for site in report.sites),
        seconds=seconds,
        peak_bytes=peak_bytes(),
        model_bytes=model_bytes,
    )


def _llama(size: Size) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // HEAD * HEAD,
        num_hidden_layers=size.layers,
        num_attention_heads=max(size.hidden // HEAD, 1),
        vocab_size=VOCABULARY,
        max_position_embeddings=size.length,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    _, chosen_spec, chosen_method, *numbers = sys.argv
    *measures, threads = map(int, numbers)
    torch.set_num_threads(threads)
    print(json.dumps(asdict(measure(chosen_spec, chosen_method, Size(*measures)))))
