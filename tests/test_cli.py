"""The command line: what a user types works from end to end, a mistake is one message."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import byte_tokenizer, tiny_llama
from torch import nn

import fp4compile
from fp4compile import checkup, cli, tasks
from fp4compile.commands import demo
from fp4compile.environment import describe_machine
from fp4compile.errors import CompileError, MissingDependencyError
from fp4compile.evaluate import Spread
from fp4compile.tensor import FP4Tensor
from fp4compile.timing import Benchmark, Measured, OpTime

Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fp4compile", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision language model with its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama(layers=1, vocabulary=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("FP4 numbers divided by their smallest step are small integers. " * 20)
    return path


@pytest.fixture(scope="module")
def quantized(plain: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    options = ["--method", "minmax", "--data", str(text), "--ignore", "*.down_proj"]
    options += ["--save-recipe", str(folder.parent / "recipe.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["fp4compile", "quantize", str(plain), str(folder), *options],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code
    return folder


def test_what_quantize_saves_is_what_the_recipe_makes(
    command: Command, plain: Path, quantized: Path, tmp_path: Path, capsys: Any
) -> None:
    again = tmp_path / "again"
    recipe = quantized.parent / "recipe.json"
    assert command("quantize", plain, again, "--recipe", recipe, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["sites"]) == 7
    assert "model.layers.0.mlp.down_proj.weight" in report["skipped"]
    texts = []
    for folder in (quantized, again):
        assert command("generate", folder, "FP4", "--new-tokens", 6, "--json", "-") == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]


def test_eval_of_the_quantized_model(
    command: Command, plain: Path, quantized: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    target = tmp_path / "result.json"
    options = ("--data", text, "--window", 32, "--tokens", 62, "--reference", plain)
    options += ("--json", target)
    assert command("eval", quantized, *options) == 0
    result = json.loads(target.read_text())
    assert result["tokens"] == 62
    assert result["perplexity"] > 1
    assert 0 < result["divergence"] < 1
    printed = capsys.readouterr().out
    assert f"{result['perplexity']:.2f}" in printed
    assert f"{result['divergence']:.4f}" in printed


def test_a_cache_of_codes_changes_what_is_scored_and_said(
    command: Command, plain: Path, text: Path, capsys: Any
) -> None:
    scores = []
    for bits in ((), ("--cache-bits", 8), ("--cache-bits", 4)):
        options = ("--data", text, "--window", 96, "--tokens", 95, *bits, "--json", "-")
        assert command("eval", plain, *options) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["cache_bits"] == (bits[1] if bits else None)
        scores.append(result["nll"])
        assert command("generate", plain, "FP4", "--new-tokens", 6, *bits, "--json", "-") == 0
        assert json.loads(capsys.readouterr().out)["new_tokens"] == 6
    assert len(set(scores)) == 3


def test_inspect_tells_what_is_stored_what_is_found_and_what_a_recipe_says(
    command: Command, plain: Path, quantized: Path, capsys: Any
) -> None:
    found = {}
    for model in (plain, quantized, quantized.parent / "recipe.json"):
        assert command("inspect", model, "--json", "-") == 0
        found[model] = json.loads(capsys.readouterr().out)
    full, stored, recipe = found.values()
    assert len(full["sites"]) == 8
    assert full["bits_per_parameter"] > 16
    assert len(stored["sites"]) == len(recipe["sites"]) == 7
    assert stored["bits_per_parameter"] < 20
    assert all(4 < site["bits_per_weight"] < 6 for site in stored["sites"])
    errors = [{site["name"]: site["error"] for site in made["sites"]} for made in (stored, recipe)]
    assert errors[0] == errors[1]
    assert stored["skipped"] == {"model.layers.0.mlp.down_proj.weight": "in ignore"}
    assert command("inspect", quantized, "--sites") == 0
    assert "model.layers.0.mlp.up_proj.weight" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["plain", "quantized"])
def test_bench_measures_what_was_asked_on_a_quantized_model(
    source: str, command: Command, request: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The measuring itself compiles, and is tested in test_benchmark.py."""

    def measured(model: nn.Module, inputs: Any, **options: Any) -> Benchmark:
        assert any(isinstance(parameter, FP4Tensor) for parameter in model.parameters())
        assert options == {"baseline": torch.float32, "repetitions": 2}
        part = Measured(Spread(1.0, 1.0, 1.0), (OpTime("gemm", "FP4 GEMM", 1, 1.0, 1.0),))
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        return Benchmark(shapes, 1, 2, part, part, "float32")

    monkeypatch.setattr(fp4compile, "benchmark", measured)
    options = ("--batch", 3, "--tokens", 5, "--baseline", "float32", "--repetitions", 2)
    assert command("bench", request.getfixturevalue(source), *options, "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["inputs"] == {"input_ids": [3, 5]}
    assert result["machine"]["cpu"]
    assert Benchmark.from_dict(result).speedup == 1


def test_chat_answers_until_the_questions_end(
    command: Command, quantized: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nexit\n"))
    assert command("chat", quantized, "--new-tokens", 3) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "PLAIN", "OUT", "--preset", "w5a5"), "unknown spec 'w5a5'"),
        (("quantize", "PLAIN", "OUT", "--method", "guess"), "unknown method 'guess'"),
        (("quantize", "PLAIN", "OUT", "--data", "nowhere.jsonl"), "there is no file nowhere.jsonl"),
        (("quantize", "./nowhere", "OUT"), "there is no directory ./nowhere"),
        (("quantize", "QUANTIZED", "OUT"), "is already an FP4 weight"),
        (("quantize", "PLAIN", "QUANTIZED"), "holds files already"),
        (("quantize", "PLAIN", "OUT", "--max-memory", "lots"), "no amount of memory"),
        (("eval", "PLAIN", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("eval", "PLAIN", "--data", "TEXT", "--cache-bits", "5"), "no format has 5 bits"),
        (("eval", "PLAIN", "--data", "TEXT", "--tokens", "1"), "hold no whole window"),
        (("eval", "PLAIN", "--task", "x", "--reference", "PLAIN"), "leave one of them out"),
        (("inspect", "TEXT"), "there is no directory"),
        (("demo", "--preset", "w5a5"), "unknown spec 'w5a5'"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_told_without_traceback(
    arguments: tuple[str, ...],
    message: str,
    command: Command,
    plain: Path,
    quantized: Path,
    text: Path,
    tmp_path: Path,
    capfd: Any,
) -> None:
    places = {"PLAIN": plain, "QUANTIZED": quantized, "TEXT": text, "OUT": tmp_path / "out"}
    assert command(*(places.get(argument, argument) for argument in arguments)) == 1
    captured = capfd.readouterr()
    assert "fp4compile: error: " in captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_wrong_usage_and_interruption_have_their_exit_codes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    assert command("quantize", "--no-such-option") == 2
    monkeypatch.setattr(cli, "app", interrupted)
    assert command("doctor") == 130


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_is_registered(name: str, command: Command, capsys: Any) -> None:
    assert command(name, "--help") == 0
    out = capsys.readouterr().out
    assert name == "demo" or f"fp4compile {name}" in out  # an example


def test_completion_is_offered(command: Command, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert command("--show-completion", "bash") == 0
    assert "_FP4COMPILE_COMPLETE" in capsys.readouterr().out


def test_doctor_names_a_kernel_for_every_kind_and_the_machine(
    command: Command, capsys: Any
) -> None:
    assert command("doctor", "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)
    kernels = [check for check in result["checks"] if check["name"].startswith("kernel for")]
    assert len(kernels) >= 9
    assert all(check["fix"] for check in kernels if check["verdict"] == checkup.SLOW)
    assert result["machine"]["versions"]["torch"] == describe_machine().versions["torch"]


def test_doctor_ends_with_3_where_something_is_broken(
    command: Command, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> nn.Module:
        raise CompileError("torch 1.0 was never tried; install torch >= 2.12")

    monkeypatch.setattr(checkup, "load_lowerings", fails)
    assert command("doctor") == 3
    assert "install torch >= 2.12" in capsys.readouterr().out


def _fails(model: nn.Module) -> nn.Module:
    raise RuntimeError("g++ was killed\nand more")


@pytest.mark.parametrize(
    ("compiled", "verdict", "said"),
    [
        (lambda model: model, checkup.OK, "bit for bit"),
        (lambda model: lambda x: model(x) + 1, checkup.BROKEN, "results differ"),
        (_fails, checkup.BROKEN, "RuntimeError: g++ was killed;"),
    ],
    ids=["works", "wrong", "fails"],
)
def test_the_probe_compares_a_compiled_layer_with_eager(
    compiled: Any, verdict: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "compile_model", compiled)
    probe = checkup.examine(probe=True)[-1]
    assert probe.verdict == verdict
    assert said in probe.found + probe.fix


def test_a_forced_target_declines_all_others(command: Command, capsys: Any) -> None:
    from fp4compile.lowering.config import config
    from fp4compile.lowering.serves import services

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "cpu_target", "cpp_portable")
        found = {service.kind: service for service in services()}
    assert found["w4a4"].target == "cpp_portable"
    assert "FP4COMPILE_CPU_TARGET" in found["w4a4"].declined["cpp_avx2"]
    assert all(service.target == "cpp_portable" for service in found.values())


def test_tasks_need_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="fp4compile\\[eval\\]"):
        tasks.run_tasks(nn.Linear(1, 1), None, ["hellaswag"])


def test_options_reach_the_demo_and_numbers_the_file(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(*arguments: Any, **options: Any) -> dict[str, Any]:
        return {"arguments": arguments, "options": {**options, "cache_dir": None}}

    monkeypatch.setattr(demo, "run_demo", run_demo)
    target = tmp_path / "numbers.json"
    assert command("demo", "--preset", "w4a8", "--tokens", "4088", "--json", str(target)) == 0
    assert json.loads(target.read_text()) == {
        "arguments": ["w4a8", "fpq"],
        "options": {"cache_dir": None, "tokens": 4088, "new_tokens": 40},
    }


def test_a_missing_package_is_one_line(
    command: Command, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo(*arguments: Any, **options: Any) -> dict[str, Any]:
        raise MissingDependencyError("needs gguf; run: pip install gguf")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert command("demo") == 1
    assert capsys.readouterr().err == "fp4compile: error: needs gguf; run: pip install gguf\n"


def test_the_machine_is_described_without_measuring() -> None:
    machine = describe_machine()
    assert machine.cores >= 1
    assert machine.threads == torch.get_num_threads()
    assert machine.versions["fp4compile"]
