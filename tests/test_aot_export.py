"""An exported file runs in a process that has no fp4compile, with the same numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import NormThenLinears, tiny_llama, tokens

import fp4compile
from fp4compile.errors import CompileError
from fp4compile.lowering.config import config

RUN = """
import sys, torch
sys.modules["fp4compile"] = None  # whoever imports it fails
program = torch._inductor.aoti_load_package(sys.argv[1])
for ids in torch.load(sys.argv[2]):
    torch.save(program(ids)["logits"], f"{sys.argv[2]}.{len(ids)}")
"""


@pytest.fixture(scope="module")
def llama():
    return fp4compile.quantize(tiny_llama(layers=1), [tokens(seed=1)], progress=False)


@pytest.fixture(scope="module")
def package(llama, tmp_path_factory) -> Path:
    return fp4compile.export(llama, tmp_path_factory.mktemp("export") / "llama.pt2")


def test_the_file_runs_without_fp4compile(llama, package, tmp_path):
    prompts = [tokens(5, 9), tokens(2, 13)]
    torch.save(prompts, tmp_path / "prompts")
    subprocess.run([sys.executable, "-c", RUN, package, tmp_path / "prompts"], check=True)
    for ids in prompts:
        got = torch.load(tmp_path / f"prompts.{len(ids)}")
        torch.testing.assert_close(got, llama(ids, use_cache=False).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.slow  # torch's headers
def test_the_file_runs_from_cpp(llama, package, tmp_path):
    from torch.utils.cpp_extension import include_paths, library_paths

    source = Path(__file__).parents[1] / "examples" / "run_package.cpp"
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O0",
            source,
            *(f"-I{path}" for path in include_paths()),
            *libraries,
            *("-ltorch", "-ltorch_cpu", "-lc10", "-o", tmp_path / "run_package"),
        ],
        check=True,
    )
    ids = tokens(1, 9)
    words = [str(token) for token in ids[0].tolist()]
    ran = subprocess.run(
        [tmp_path / "run_package", package, *words], check=True, capture_output=True, text=True
    )
    token, largest = ran.stdout.split()
    # The same file, run from Python, on the same CPU.
    expected = fp4compile.load_exported(package)(ids.repeat(2, 1))["logits"][0, -1]
    assert int(token) == int(expected.argmax())
    assert float(largest) == pytest.approx(float(expected.max()), rel=1e-5)


def test_the_cpu_is_checked_at_load(package, monkeypatch):
    ids = tokens(3, 4)
    assert fp4compile.load_exported(package)(ids)["logits"].shape[:2] == (3, 4)
    monkeypatch.setattr("fp4compile.aot_export.cpu_features", lambda: ["sse4_2"])
    with pytest.raises(CompileError, match=r"compiled for a CPU with .*avx"):
        fp4compile.load_exported(package)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "other.pt2").write_text("no package")
    with pytest.raises(CompileError, match="not written by"):
        fp4compile.load_exported(tmp_path / "other.pt2")


def test_models_that_cannot_run_alone_are_refused(tmp_path, monkeypatch):
    x = torch.randn(5, 32)
    path = tmp_path / "model.pt2"
    with pytest.raises(CompileError, match="no FP4 weights"):
        fp4compile.export(NormThenLinears(), path, (x,))
    model = fp4compile.quantize(NormThenLinears(), [x], method="minmax", progress=False)
    with monkeypatch.context() as forced:
        forced.setattr(config, "cpu_target", "reference")
        with pytest.raises(CompileError, match=r"up\.weight: .*forced"):
            fp4compile.export(model, path, (x,))
    with pytest.raises(CompileError, match=r"end in \.pt2"):
        fp4compile.export(model, tmp_path / "model.so")
    assert not path.exists()
