"""Calibration within a memory limit, after a kill, and by two processes: the same decisions."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_llama, tokens
from safetensors.torch import load_file

import fp4compile
from fp4compile.batches import as_batches
from fp4compile.calibrate import run_calibration
from fp4compile.checkpoint import fingerprint, open_checkpoint
from fp4compile.errors import (
    CalibrationDataError,
    CheckpointError,
    MemoryLimitError,
    NonFiniteError,
)
from fp4compile.hidden_states import HiddenStates, storage_bytes
from fp4compile.memory import parse_size, plan_memory
from fp4compile.observers import AbsMaxObserver, SampleObserver
from fp4compile.qparams import QuantSpec
from fp4compile.search import METHODS, SearchMethod
from fp4compile.trace import trace

DATA = [tokens(seed=seed) for seed in range(1, 5)]
HERE = Path(__file__).parent


@pytest.fixture
def recipe(tmp_path_factory):
    """Every bit that a run decides."""

    def run(**options):
        model = fp4compile.quantize(tiny_llama(), DATA, progress=False, **options)
        path = tmp_path_factory.mktemp("recipe") / "recipe.json"
        model.fp4_report.recipe.save(path)
        codes_path = path.with_suffix(".safetensors")
        codes = load_file(codes_path) if codes_path.exists() else {}
        return json.loads(path.read_text())["sites"], {k: v.tolist() for k, v in codes.items()}

    return run


def traced(rows: int = 4, length: int = 24):
    model = tiny_llama()
    batches = as_batches([tokens(rows, length, seed) for seed in range(1, 5)], model)
    return model, trace(model, *batches[0]), batches


# Hidden states


@pytest.mark.parametrize("limit", [0, 60_000, None], ids=["disk", "some", "memory"])
def test_inputs_do_not_depend_on_where_hidden_states_are(limit, tmp_path):
    _, graph, batches = traced()
    expected, seen = [], []
    hidden = HiddenStates(limit, tmp_path / "hidden")
    with torch.no_grad():
        run_calibration(graph, batches, lambda _, xs: expected.extend(xs) or {})
        run_calibration(graph, batches, lambda _, xs: seen.extend(xs) or {}, hidden=hidden)
    assert len(seen) == len(batches) * len(graph.groups)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert (hidden.spilled == 0) == (limit is None)
    assert not (tmp_path / "hidden").exists()


def test_inputs_that_nobody_reads_still_pass():
    _, graph, batches = traced()
    counts = []

    def only_the_last(group, inputs):
        if group.inputs == last:
            counts.extend(len(x) for x in inputs)
        return {}

    last = next(group.inputs for group in graph.groups if group.sites[0].lookups)
    with torch.no_grad():
        run_calibration(graph, batches, only_the_last)
    assert counts == [4 * 24] * len(batches)


def test_values_that_share_a_storage_keep_it_on_disk(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    values = [whole.t(), [whole[:2], 7], whole.expand(3, 4, 6)]
    with HiddenStates(0, tmp_path) as hidden:
        hidden.put(5, values)
        taken = hidden.take(5)
    assert storage_bytes([taken[0], taken[1][0], taken[2]]) == storage_bytes([whole])
    assert taken[1][1] == 7
    for got, expected in ((taken[0], values[0]), (taken[2], values[2])):
        assert torch.equal(got, expected)
        assert got.stride() == expected.stride()


# Memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("800MB", 800_000_000), ("1.5 KiB", 1536), (12, 12), ("7B", 7)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2 parsecs", -1, 0, "GiB", "1e3", "3iB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(MemoryLimitError, match="2GiB"):
        parse_size(text)


def test_the_smallest_limit_that_an_error_names_works(caplog):
    model, graph, batches = traced(length=128)
    spec = QuantSpec.preset("w4a4")
    with pytest.raises(MemoryLimitError, match="even with a sample of 512") as error:
        plan_memory(model, graph, batches, spec, "1MB")
    needed = str(error.value).split("'")[1]
    with caplog.at_level(logging.INFO):
        plan = plan_memory(model, graph, batches, spec, needed)
    assert plan.sample_tokens == 512
    assert plan.peak <= plan.limit == parse_size(needed)
    assert "sample of 512 tokens instead of 2048" in caplog.text
    assert f"at most {needed.removesuffix('MiB')} MiB" in caplog.text
    assert plan_memory(model, graph, batches, spec, "8GiB").sample_tokens == 8192
    assert plan_memory(model, graph, batches, spec).limit > 0
    # A sample of its own size, down to the fewest.
    for sample, limit, planned in ((20000, "8GiB", 20000), (700, needed, 512)):
        plan = plan_memory(model, graph, batches, spec, limit, sample_tokens=sample)
        assert plan.sample_tokens == planned


# Observers


def test_a_sample_does_not_depend_on_how_batches_are_divided():
    batches = torch.arange(600.0).view(6, 100, 1)
    whole = SampleObserver(1, 150)
    parts = [SampleObserver(1, 150, first=rank, stride=2) for rank in range(2)]
    for index, x in enumerate(batches):
        whole.update(x)
        parts[index % 2].update(x)
    parts[1].merge(parts[0])
    assert torch.equal(parts[1].value, whole.value)
    assert torch.equal(whole.value, whole.value.sort(dim=0).values)
    assert AbsMaxObserver(1).value.shape == (1,)


# Resuming


@pytest.mark.parametrize("sequential", [False, True], ids=["parallel", "sequential"])
def test_an_interrupted_run_goes_on_with_the_same_bits(sequential, tmp_path, monkeypatch, recipe):
    expected = recipe(method="minmax", sequential=sequential)
    done = []
    search = METHODS["minmax"].search_group

    def stop_at_the_fifth(problem):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(list(problem.weights))
        return search(problem)

    options = {"method": "minmax", "sequential": sequential, "calibration_dir": tmp_path}
    with monkeypatch.context() as patch:
        method = SearchMethod(stop_at_the_fifth, METHODS["minmax"].search_lookup)
        patch.setitem(METHODS, "minmax", method)
        with pytest.raises(KeyboardInterrupt):
            recipe(**options)
        done.append([])
        assert recipe(**options) == expected
    assert len({name for names in done for name in names}) == 15
    assert sum(map(len, done)) == 15  # nothing is decided twice
    monkeypatch.setitem(METHODS, "minmax", None)
    assert recipe(**options | {"max_memory": "1GiB"}) == expected  # nothing is left to decide


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
import fp4compile
from fp4compile.search import METHODS, SearchMethod
from models import tiny_llama
from test_large import DATA
calls = []
def search(problem, search=METHODS["minmax"].search_group):
    calls.append(problem)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return search(problem)
METHODS["minmax"] = SearchMethod(search, METHODS["minmax"].search_lookup)
fp4compile.quantize(
    tiny_llama(), DATA, method="minmax", calibration_dir={folder!r}, progress=False
)
"""


def run_script(text: str, *launcher: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *launcher, *(() if launcher else ("-c", text))],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.fixture
def one_thread():
    # Sums over several threads may differ in the last bit from one process to the next.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, recipe, one_thread):
    killed = run_script(KILLED.format(here=str(HERE), folder=str(tmp_path)))
    assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.glob("group-*.pt"))) == 3
    again = recipe(method="minmax", calibration_dir=tmp_path)
    assert again == recipe(method="minmax")
    assert len(list(tmp_path.glob("group-*.pt"))) == 9
    assert not list(tmp_path.glob("*.partial"))


def test_a_directory_of_another_run_is_refused(tmp_path):
    model = tiny_llama()
    batches = as_batches(DATA, model)
    options = {"method": "fpq", "sequential": False}
    open_checkpoint(tmp_path, fingerprint(model, ["a"], batches, options))
    open_checkpoint(tmp_path, fingerprint(model, ["a"], batches, options))
    others = {
        "method": fingerprint(model, ["a"], batches, options | {"method": "minmax"}),
        "sites": fingerprint(model, ["b"], batches, options),
        "calib_data": fingerprint(model, ["a"], batches[1:], options),
    }
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    others["parameters"] = fingerprint(model, ["a"], batches, options)
    for key, other in others.items():
        with pytest.raises(CheckpointError, match=f"another run: {key} was .* another directory"):
            open_checkpoint(tmp_path, other)


def test_what_cannot_be_read_says_so(tmp_path):
    run = {"method": "fpq"}
    open_checkpoint(tmp_path, run)
    (tmp_path / "group-x.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="delete it"):
        open_checkpoint(tmp_path, run)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path, run)
    (tmp_path / "run.json").unlink()
    with pytest.raises(CheckpointError, match="another one"):
        open_checkpoint(tmp_path, run)
    with pytest.raises(CheckpointError, match="writable"):
        open_checkpoint(tmp_path / "group-x.pt", run)


def test_a_failed_search_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    def fails(problem):
        raise NonFiniteError("in the search")

    method = SearchMethod(fails, METHODS["minmax"].search_lookup)
    monkeypatch.setitem(METHODS, "minmax", method)
    model = tiny_llama().train()
    with pytest.raises(NonFiniteError, match="in the search"):
        fp4compile.quantize(
            model,
            DATA,
            method="minmax",
            progress=False,
            max_memory="1GiB",
            calibration_dir=tmp_path,
        )
    assert model.training
    expected = tiny_llama().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


# Several processes

# What both runs are asked: the first layer and the tied head, by the full search.
SHARED = {"targets": ["*layers.0.*", "*embed_tokens*"], "progress": False}

WORKER = """
import sys
sys.path.insert(0, {here!r})
import torch
import torch.distributed as dist
import fp4compile
from fp4compile.errors import CalibrationDataError
from models import tiny_llama
from test_large import DATA, SHARED
dist.init_process_group("gloo")
rank = dist.get_rank()
try:
    fp4compile.quantize(tiny_llama(), DATA[:1], progress=False)
except CalibrationDataError as error:
    print(error)
for sequential in (False, True):
    model = fp4compile.quantize(tiny_llama(), DATA, sequential=sequential, **SHARED)
    torch.save(model.fp4_report.recipe.sites, f"{folder}/{{rank}}-{{sequential}}.pt")
dist.barrier()  # nobody leaves while another still needs it
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_decide_what_one_does(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(HERE), folder=str(tmp_path)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
    ran = run_script("", *launcher, "--nproc-per-node=2", str(script))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("1 calibration batches cannot be divided over 2") == 2
    for sequential in (False, True):
        first, second = (
            torch.load(tmp_path / f"{rank}-{sequential}.pt", weights_only=False) for rank in (0, 1)
        )
        one = fp4compile.quantize(tiny_llama(), DATA, sequential=sequential, **SHARED)
        expected = one.fp4_report.recipe.sites
        assert first.keys() == second.keys() == expected.keys()
        for name, site in expected.items():
            for found in (first[name], second[name]):
                same_decision(found, site)


def same_decision(found, site) -> None:
    """Samples and maxima are the same bits, second moments up to the order of their sum; and so
    are the decisions, whose scales lie on a grid. One float32 rounding of 2^-24 is far below 1e-6.
    """
    assert found.weight.format == site.weight.format
    torch.testing.assert_close(found.weight.scale, site.weight.scale, rtol=1e-6, atol=0)
    if site.activation is not None:
        assert found.activation.format == site.activation.format
        torch.testing.assert_close(found.activation.scale, site.activation.scale, rtol=1e-6, atol=0)
        shift = site.activation.exponent_shift
        assert (found.activation.exponent_shift is None) == (shift is None)
        assert shift is None or torch.equal(found.activation.exponent_shift, shift)


def test_too_few_batches_for_the_processes_are_an_error():
    from fp4compile.distributed import Processes

    with pytest.raises(CalibrationDataError, match="divided over 3 processes"):
        Processes(0, 3).share(DATA[:2])
    assert [len(Processes(rank, 3).share(DATA)) for rank in range(3)] == [2, 1, 1]
