"""The version guard, and the source hash in Inductor's cache key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor_config

from fp4compile.errors import CompileError
from fp4compile.lowering import inductor


@pytest.mark.parametrize("version", ["2.12.0", "2.13.1+cpu", "2.14.0a0"])
def test_accepted_versions(version: str) -> None:
    inductor.check_torch_version(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0"])
def test_refused_versions(version: str) -> None:
    with pytest.raises(CompileError, match=r"torch >= 2\.12"):
        inductor.check_torch_version(version)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_users_pass_stays(as_list: bool) -> None:
    def users_pass(graph: torch.fx.Graph) -> None:
        pass

    present = [users_pass] if as_list else users_pass
    with inductor_config.patch(post_grad_custom_pre_pass=present):
        inductor.install_source_hash(str)
        inductor.install_source_hash(str)
        first, ours = inductor_config.post_grad_custom_pre_pass
        assert first is users_pass
        assert inductor.source_hash_installed()
        assert ours.uuid().startswith("fp4compile-")


def test_importing_installs_the_hash() -> None:
    assert inductor.source_hash_installed()


def test_hash_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernel.jinja"
    source.write_text("one")
    monkeypatch.setattr(inductor, "PACKAGE_ROOTS", (tmp_path,))
    before = inductor.source_hash.__wrapped__()
    source.write_text("two")
    assert inductor.source_hash.__wrapped__() != before


PROGRAM = """
import sys
from pathlib import Path
import torch
from fp4compile.lowering import inductor
inductor.PACKAGE_ROOTS += (Path(sys.argv[1]),)
packed, scale = torch.ones(8, 8, dtype=torch.uint8), torch.ones(8)
def run(operand):
    return torch.ops.fp4.linear(operand, None, packed, scale, None, "e2m1", torch.float32)
torch.compile(run, dynamic=True)(torch.ones(3, 16, dtype=torch.int8))
hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print("hit" if hits else "miss")
"""


def test_an_edited_source_misses_the_cache_of_another_process(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        # The cache under test is Inductor's own, not the one above it.
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    }

    def start() -> str:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(sources)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.strip()

    (sources / "kernel.jinja").write_text("one")
    assert [start(), start()] == ["miss", "hit"]
    (sources / "kernel.jinja").write_text("two")
    assert start() == "miss"
