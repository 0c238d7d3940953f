"""What the documentation shows works: its Python runs, its commands exist, its errors are real."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click import Command, Context
from models import TinyLanguageModel, byte_tokenizer, tiny_llama
from torch import nn
from typer.main import get_command

import fp4compile
from fp4compile.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
# An HTML comment before a block says what it needs: "given: quantized" (``model`` is quantized),
# "raises" (with the message of the text block that follows), or "not run: <reason>".
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n)?```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<said>.*?)```)?",
    re.DOTALL,
)
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Python of a page, and the line it starts at."""

    page: Path
    line: int
    code: str
    mark: str
    said: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text[: found.start("code")].count("\n")
            yield Block(
                page, line, found["code"], found["mark"] or "", (found["said"] or "").strip()
            )


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    torch.manual_seed(0)
    return TinyLanguageModel()


@pytest.fixture(scope="module")
def quantized(language_model: nn.Module) -> nn.Module:
    return fp4compile.quantize(
        copy.deepcopy(language_model), _data(), method="minmax", progress=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers loads."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(layers=1, vocabulary=257).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def _data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 257, (4, 24), generator=generator)]


@pytest.fixture
def namespace(language_model: nn.Module, folder: Path) -> dict[str, Any]:
    """What the pages take as given: a small language model, fresh for every block."""
    return {
        "fp4compile": fp4compile,
        "torch": torch,
        "nn": nn,
        "name": str(folder),
        "model": copy.deepcopy(language_model),
        "other": copy.deepcopy(language_model),
        "tokenizer": byte_tokenizer(),
        "data": _data(),
        "ids": _data()[0],
        "texts": ["Four bits hold sixteen codes. " * 40],
    }


@pytest.mark.parametrize("block", list(blocks()), ids=str)
def test_python_of_the_docs_runs(
    block: Block,
    namespace: dict[str, Any],
    quantized: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if block.mark.startswith("not run: "):
        pytest.skip(block.mark)
    assert block.mark in ("", "raises", "given: quantized"), "an unknown mark"
    monkeypatch.chdir(tmp_path)
    if block.mark == "given: quantized":
        namespace["model"] = copy.deepcopy(quantized)
        namespace["model"].fp4_report = quantized.fp4_report
    code = compile(block.code, str(block), "exec")
    # Compiling is tested elsewhere, and would take most of the time here.
    with torch.compiler.set_stance("force_eager"):
        if block.mark == "raises":
            with pytest.raises(fp4compile.Fp4CompileError, match=re.escape(block.said)):
                exec(code, namespace)
        else:
            exec(code, namespace)


def command_lines() -> list[tuple[str, str]]:
    return [
        (page.name, line.removeprefix("$ ").partition("  #")[0])
        for page in PAGES
        for console in CONSOLE.findall(page.read_text(encoding="utf-8"))
        for line in console.splitlines()
        if line.startswith("$ fp4compile")
    ]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_of_the_docs_are_taken(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    group: Any = get_command(app)
    if words[0].startswith("-"):
        assert any(words[0] in option.opts for option in group.get_params(Context(group)))
        return
    command: Command = group.commands[words[0]]
    if words[1:] != ["--help"]:
        command.make_context(words[0], words[1:])  # fails on options or arguments that are not


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[:-1] if f": {page.name}" not in text]
