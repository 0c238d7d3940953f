"""The version guard, and the source hash in Inductor's cache key."""

from __future__ import annotations

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
    with pytest.raises(CompileError, match="torch >= 2.12"):
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


def test_hash_follows_the_sources(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernel.jinja"
    source.write_text("one")
    monkeypatch.setattr(inductor, "PACKAGE_ROOTS", (tmp_path,))
    before = inductor.source_hash.__wrapped__()
    source.write_text("two")
    assert inductor.source_hash.__wrapped__() != before
