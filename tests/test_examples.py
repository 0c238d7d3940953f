"""Every example runs, on tiny models; what compiling does to a model is tested elsewhere."""

from __future__ import annotations

import runpy
import socket
from pathlib import Path

import pytest
import torch
from models import byte_tokenizer, tiny_llama
from PIL import Image

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        with torch.compiler.set_stance("force_eager"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(layers=1, vocabulary=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_llm(run, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("FP4 numbers divided by their smallest step are small integers. " * 20)
    out = run("llm.py", llama, "--text", text, "--method", "minmax", "--tokens", 511)
    assert "in FP4" in out
    assert (tmp_path / "recipe.json").is_file()


def test_bert(run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=257,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    assert "% of " in run("bert.py", tmp_path / "bert", "--length", 24, "--method", "minmax")


def test_vit(run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    for index in range(3):
        noise = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / f"{index}.png")
    out = run("vit.py", tmp_path / "vit", "--images", tmp_path, "--method", "minmax")
    assert "of 3 images" in out
    assert "8 weights quantized" in out  # the patch embedding among them


def test_custom_model(run, tmp_path: Path) -> None:
    assert "relative error" in run("custom_model.py", "--channels", 32)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_torchrun_of_one_process(run, llama: Path, tmp_path: Path, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in rendezvous.items():
        monkeypatch.setenv(name, str(value))
    out = run("torchrun.py", llama, "--method", "minmax", "--calibration-dir", "calibration")
    assert "weights quantized" in out
    assert list((tmp_path / "calibration").glob("*.pt"))
    assert not torch.distributed.is_initialized()


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
