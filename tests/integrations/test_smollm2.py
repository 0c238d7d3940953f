"""The integrations on a trained model, SmolLM2-135M-Instruct: compile, generate, load, export.

It is quantized once. Programs compile its repeated blocks once; Dynamo and AOTInductor compile
them one by one, so they get its first layer, with the embedding and the head.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama, tokens
from torch import nn
from torch._dynamo.utils import counters

import fp4compile
from fp4compile.compile import compile_model
from fp4compile.demo_model import load_demo_model
from fp4compile.lowering.config import config
from fp4compile.tensor import FP4Tensor

pytestmark = pytest.mark.slow  # 135 million weights
LAYERS = 1
GREEDY = {"do_sample": False}
TEXT = "The capital of France is Paris, and the capital of Germany is Berlin. Both are"


@pytest.fixture(scope="module")
def full(demo_cache: Path) -> tuple[Any, torch.Tensor]:
    """The model, and tokens of a text."""
    model, tokenizer = load_demo_model(demo_cache, torch.float32)
    return model, tokenizer(TEXT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def ids(full: tuple[Any, torch.Tensor]) -> torch.Tensor:
    return full[1]


@pytest.fixture(scope="module")
def smollm2(full: tuple[Any, torch.Tensor], ids: torch.Tensor) -> Any:
    model = copy.deepcopy(full[0])
    return fp4compile.quantize(model, [ids.repeat(2, 1)], "w4a8", method="minmax", progress=False)


@pytest.fixture(scope="module")
def first_layers(smollm2: Any) -> Any:
    """A model of its own, on the same weights."""
    cut = copy.deepcopy(smollm2.config)
    cut.num_hidden_layers = LAYERS
    with torch.device("meta"):
        model = type(smollm2)(cut).eval()
    model.model.layers = smollm2.model.layers[:LAYERS]
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(model.model, name, getattr(smollm2.model, name))
    model.lm_head, model.generation_config = smollm2.lm_head, smollm2.generation_config
    return model


def prompts(ids: torch.Tensor, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Pieces of the text, each a token further."""
    pieces = ids[0].unfold(0, length, 1)[:batch].contiguous()
    return {"input_ids": pieces, "attention_mask": torch.ones_like(pieces)}


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target that compiles fastest; the others' texts are tested in tests/lowering."""
    monkeypatch.setattr(config, "cpu_target", "cpp_portable")


def test_plain_torch_compile_compiles_once_for_all_prompts_and_steps(
    first_layers: Any, ids: torch.Tensor, portable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [(4, 9, 4), (5, 7, 6), (6, 11, 3)]
    expected = [
        first_layers.generate(**prompts(ids, batch, length), max_new_tokens=steps, **GREEDY)
        for batch, length, steps in calls
    ]
    torch.compiler.reset()
    counters.clear()
    forward = torch.compile(first_layers.forward, fullgraph=True, dynamic=True)
    monkeypatch.setattr(first_layers, "forward", forward, raising=False)
    for index, (batch, length, steps) in enumerate(calls):
        prompt = prompts(ids, batch, length)
        got = first_layers.generate(**prompt, max_new_tokens=steps, **GREEDY)
        assert torch.equal(got, expected[index])
        if index == 0:
            graphs = counters["stats"]["unique_graphs"]
    # A prompt, the first step (the cache is as the prompt left it), and all others.
    assert counters["stats"]["unique_graphs"] == graphs <= 3
    assert not counters["graph_break"]


@pytest.fixture(scope="module")
def compiled(smollm2: Any) -> Any:
    return compile_model(copy.deepcopy(smollm2))


def test_generate_writes_the_tokens_of_the_eager_model(
    smollm2: Any, compiled: Any, ids: torch.Tensor, portable: None
) -> None:
    programs = []
    for batch, length, steps in ((2, 9, 4), (3, 13, 8)):
        prompt = prompts(ids, batch, length)
        expected = smollm2.generate(**prompt, max_new_tokens=steps, **GREEDY)
        # With a static cache, since none is asked for.
        assert torch.equal(compiled.generate(**prompt, max_new_tokens=steps, **GREEDY), expected)
        programs.append(compiled._compiled_call_impl.programs)
    assert programs == [2, 2], "more than a prompt and a step were compiled"


def test_with_a_growing_cache_too(
    smollm2: Any, compiled: Any, ids: torch.Tensor, portable: None
) -> None:
    prompt = prompts(ids, 1, 12)
    expected = smollm2.generate(**prompt, max_new_tokens=6, **GREEDY)
    got = compiled.generate(**prompt, max_new_tokens=6, cache_implementation="dynamic", **GREEDY)
    assert torch.equal(got, expected)


RUN = """
import sys, torch
sys.modules["fp4compile"] = None  # whoever imports it fails
program = torch._inductor.aoti_load_package(sys.argv[1])
for path in sys.argv[2:]:
    torch.save(program(torch.load(path))["logits"], path + ".logits")
"""


def test_an_exported_file_runs_without_fp4compile(
    first_layers: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=2048)
    package = fp4compile.export(
        first_layers, tmp_path / "model.pt2", (ids.repeat(2, 1),), ({0: batch, 1: length},)
    )
    inputs = {tmp_path / f"ids{n}": prompts(ids, n, 7 + n)["input_ids"] for n in (2, 5)}
    for path, value in inputs.items():
        torch.save(value, path)
    subprocess.run([sys.executable, "-c", RUN, package, *inputs], check=True)
    for path, value in inputs.items():
        expected = first_layers(value, use_cache=False).logits
        torch.testing.assert_close(torch.load(f"{path}.logits"), expected, rtol=1e-3, atol=1e-3)


LOAD = """
import re, sys, torch, fp4compile
from transformers import AutoModelForCausalLM

def memory(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[2])  # what is imported and cached by the first load
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = memory("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
for parameter in model.parameters():  # the file is mapped: pages count once they are read
    if hasattr(parameter, "packed_weight"):
        parameter.packed_weight.max()
print(memory("VmHWM") - before)
ids = torch.arange(1, 9)[None]
torch.save(model(ids, use_cache=False).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def saved(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.save_pretrained(folder, max_shard_size="20MB")
    return folder


def test_it_loads_within_little_more_than_its_checkpoint(
    smollm2: Any, saved: Path, tmp_path: Path
) -> None:
    tiny = fp4compile.quantize(tiny_llama(layers=1), [tokens()], method="minmax", progress=False)
    tiny.save_pretrained(tmp_path / "tiny")
    size = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert 8 * size / sum(parameter.numel() for parameter in smollm2.parameters()) < 4.2
    result = subprocess.run(
        [sys.executable, "-c", LOAD, saved, tmp_path / "tiny", tmp_path / "logits"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    # The mapped file's pages, all read, and what transformers makes beside them.
    assert int(result.stdout) < 1.3 * size
    expected = smollm2(torch.arange(1, 9)[None], use_cache=False).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_its_state_survives_a_weights_only_file(smollm2: Any, tmp_path: Path) -> None:
    torch.save(smollm2.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True)
    loaded: nn.Module = type(smollm2)._from_config(smollm2.config)
    loaded.load_state_dict(state, assign=True)
    loaded.tie_weights()
    for name, value in smollm2.state_dict().items():
        again = loaded.state_dict()[name]
        parts = value.__tensor_flatten__()[0] if isinstance(value, FP4Tensor) else ("data",)
        assert all(torch.equal(getattr(again, p), getattr(value, p)) for p in parts), name
