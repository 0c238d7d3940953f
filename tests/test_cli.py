"""The command line: options reach the demo, a user's mistake is one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fp4compile import cli
from fp4compile.errors import MissingDependencyError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fp4compile", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    return run


def test_options_reach_the_demo_and_numbers_the_file(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {"arguments": arguments, "options": {**options, "cache_dir": None}}

    monkeypatch.setattr(cli, "run_demo", run_demo)
    target = tmp_path / "numbers.json"
    assert command("demo", "--preset", "w4a8", "--tokens", "4088", "--json", str(target)) == 0
    assert json.loads(target.read_text()) == {
        "arguments": ["w4a8", "fpq"],
        "options": {"cache_dir": None, "tokens": 4088, "new_tokens": 40},
    }


@pytest.mark.parametrize(("option", "value"), [("--preset", "w5a5"), ("--method", "guess")])
def test_a_wrong_name_fails_before_anything_is_loaded(
    option: str, value: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("demo", option, value) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert value in captured.err


def test_a_missing_package_is_one_line(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(*arguments: Any, **options: Any) -> dict[str, Any]:
        raise MissingDependencyError("needs gguf; run: pip install gguf")

    monkeypatch.setattr(cli, "run_demo", run_demo)
    assert command("demo") == 1
    assert capsys.readouterr().err == "fp4compile: error: needs gguf; run: pip install gguf\n"
