"""Whole models, one process per candidate: prefill, decode, latency, compile time and memory.

All candidates are loaded first and then take turns, so a drift of the machine hits them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from bench.machine import Rate
from bench.peers import PEERS, reason_absent

# Tokens of a call that compiles what a batch size needs.
WARM_UP = 3


@dataclass(frozen=True)
class ModelResult:
    """Tokens per second, of all of the batch, of prompts of ``prompt`` tokens and of decoding after
    them; milliseconds per step of decoding; seconds until the first prefill and decode were done,
    with an empty compiler cache and with a full one; peak memory of the process.
    """

    name: str
    model: str
    threads: int
    prompt: int
    batch: int
    prefill: Rate
    decode: Rate
    token_ms_p50: float
    token_ms_p95: float
    compile_cold: float
    compile_warm: float | None
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Skipped:
    """A candidate that could not run here, and why."""

    name: str
    reason: str


class _Worker:
    """A candidate in a process of its own, told what to do by lines on its standard input."""

    def __init__(self, name: str, model: str, threads: int, prompt: int, cache: str) -> None:
        self.name = name
        command = [sys.executable, "-m", "bench.peers", name, model, str(threads), str(prompt)]
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "OMP_NUM_THREADS": str(threads),
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise _EndedError(f"its process ended with {self._process.wait()}; its error is above")

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it may have ended
            self._process.stdin.close()
        self._process.wait()


class _EndedError(RuntimeError):
    """A candidate's process is no more."""


def run(
    names: Sequence[str],
    model: str,
    threads: int,
    *,
    prompt: int,
    batches: Sequence[int],
    new: int,
    repetitions: int,
) -> Iterator[ModelResult | Skipped]:
    """A result per candidate and batch size, or a reason."""
    with ExitStack() as stack:
        workers: dict[str, _Worker] = {}
        # Seconds of the first call, with an empty compiler cache and with a full one.
        first: dict[str, tuple[float, float | None]] = {}
        for name in names:
            reason = reason_absent(name, model)
            if reason is not None:
                yield Skipped(name, reason)
                continue
            start = f"measure {WARM_UP} {1 if PEERS[name].own else batches[0]}"
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            worker = _Worker(name, model, threads, prompt, cache)
            stack.callback(worker.close)
            try:
                first[name] = worker.ask(start)["seconds"], None
                if PEERS[name].compiles:
                    worker.close()
                    worker = _Worker(name, model, threads, prompt, cache)
                    stack.callback(worker.close)
                    first[name] = first[name][0], worker.ask(start)["seconds"]
            except _EndedError as error:
                yield Skipped(name, str(error))
                continue
            workers[name] = worker
        for batch in batches:
            turns: dict[str, list[dict[str, Any]]] = {}
            for name, worker in workers.items():
                if batch > 1 and PEERS[name].own:
                    yield Skipped(name, "is driven with batch 1 only")
                    continue
                if batch != batches[0]:  # with which it started
                    worker.ask(f"measure {WARM_UP} {batch}")
                turns[name] = []
            for _ in range(repetitions):
                for name, found in turns.items():
                    found.append(workers[name].ask(f"measure {new} {batch}"))
            for name, found in turns.items():
                measured = _measured(found, prompt, batch)
                yield ModelResult(
                    name,
                    model,
                    threads,
                    prompt,
                    batch,
                    *measured,
                    *first[name],
                    max(turn["peak_bytes"] for turn in found),
                )


def _measured(
    turns: Sequence[dict[str, Any]], prompt: int, batch: int
) -> tuple[Rate, Rate, float, float]:
    """Rates of prefill and decode, and milliseconds per step: the median, and above 95%."""
    milliseconds = [ms for turn in turns for ms in turn["token_ms"]]
    return (
        _rate([batch * prompt / turn["prefill"] for turn in turns]),
        _rate([batch * 1e3 / median(turn["token_ms"]) for turn in turns]),
        median(milliseconds),
        quantiles(milliseconds, n=20)[-1],
    )


def _rate(values: list[float]) -> Rate:
    return Rate(median(values), min(values), max(values))
