"""Plain torch.compile serves quantized models, and a recipe quantizes while compiling."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import MatrixProducts, NormThenLinears, tiny_llama, tokens
from torch import nn
from torch._dynamo.utils import counters

import fp4compile
from fp4compile.errors import RecipeError

DATA = [tokens(seed=1)]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return fp4compile.quantize(tiny_llama(layers=1), DATA, progress=False)


@contextmanager
def no_graph_breaks() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_one_graph_serves_all_batches_and_lengths(llama):
    """With caches and decode steps: test_compile.py, integrations/test_smollm2.py."""
    with no_graph_breaks(), torch.no_grad():
        compiled = torch.compile(llama, fullgraph=True, dynamic=True)
        for batch, length in ((3, 7), (2, 12), (5, 9)):
            ids = tokens(batch, length, seed=batch)
            got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, llama(ids, use_cache=False).logits)
    assert counters["stats"]["unique_graphs"] == 1


# Each backend with every mode would compile the same kernels twice.
@pytest.mark.parametrize(
    ("backend", "mode"),
    [("inductor", "default"), ("fp4compile", "reduce-overhead"), ("fp4compile", "max-autotune")],
)
def test_every_mode_gives_the_bits_of_the_eager_model(backend, mode):
    x = torch.randn(5, 32)
    model = fp4compile.quantize(NormThenLinears(), [x], progress=False).eval()
    with no_graph_breaks(), torch.no_grad():
        compiled = torch.compile(model, backend=backend, mode=mode, fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(torch.randn(9, 32))
    assert counters["stats"]["unique_graphs"] == 1


LLAMA = "llama"
RECIPES = {
    LLAMA: (lambda: tiny_llama(layers=1), tokens(seed=1), tokens(3, 7)),
    "linears": (NormThenLinears, torch.randn(64, 32), torch.randn(5, 32)),
    "products": (MatrixProducts, torch.randn(64, 16), torch.randn(5, 16)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_quantizes_on_the_fly(name, tmp_path):
    make, data, x = RECIPES[name]
    torch.manual_seed(0)
    full = make().eval()
    quantized = make().eval()
    quantized.load_state_dict(full.state_dict())
    fp4compile.quantize(quantized, [data], progress=False)
    quantized.fp4_report.recipe.save(tmp_path / "recipe.json")
    options = {"recipe": str(tmp_path / "recipe.json"), "max_autotune": False}
    with no_graph_breaks(), torch.no_grad():
        compiled = torch.compile(
            full, backend="fp4compile", options=options, fullgraph=True, dynamic=True
        )
        got, expected = compiled(x), quantized(x)
    if name == LLAMA:
        got, expected = got.logits, expected.logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # The model itself is as it was.
    assert not any(hasattr(parameter, "packed_weight") for parameter in full.parameters())


def test_changed_weights_are_quantized_anew():
    x = torch.randn(5, 32)
    full = NormThenLinears().eval()
    recipe = fp4compile.quantize(
        NormThenLinears().eval(), [x], "w4a16", method="minmax", targets=["down.weight"]
    ).fp4_report.recipe
    compiled = torch.compile(full, backend="fp4compile", options={"recipe": recipe}, dynamic=True)
    with torch.no_grad():
        before = compiled(x)
        full.down.weight.mul_(2)
        torch.compiler.reset()
        assert not torch.equal(compiled(x), before)


def test_a_recipe_of_another_model_is_refused():
    x = torch.randn(5, 32)
    recipe = fp4compile.quantize(NormThenLinears(), [x], method="minmax").fp4_report.recipe
    torch.compiler.reset()
    compiled = torch.compile(MatrixProducts(), backend="fp4compile", options={"recipe": recipe})
    with torch.no_grad(), pytest.raises(Exception, match="another model") as caught:
        compiled(torch.randn(5, 16))
    assert isinstance(caught.value.inner_exception, RecipeError)


def test_a_quantized_model_takes_no_recipe():
    x = torch.randn(5, 32)
    model = fp4compile.quantize(NormThenLinears(), [x], "w4a16", method="minmax", progress=False)
    torch.compiler.reset()
    options = {"recipe": model.fp4_report.recipe}
    with pytest.raises(Exception, match="quantized already"):
        torch.compile(model, backend="fp4compile", options=options)(x)


def test_weights_that_a_graph_lacks_are_named(caplog):
    x = torch.randn(5, 32)
    full = NormThenLinears().eval()
    recipe = fp4compile.quantize(
        NormThenLinears().eval(), [x], "w4a16", method="minmax"
    ).fp4_report.recipe
    torch.compiler.reset()
    compiled = torch.compile(full.gate, backend="fp4compile", options={"recipe": recipe})
    with torch.no_grad(), pytest.raises(Exception, match="another model"):
        compiled(x)  # a submodule's weights have other names

    def only_gate(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model.gate(x)

    part = torch.compile(only_gate, backend="fp4compile", options={"recipe": recipe})
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fp4compile"):
        part(full, x)
    assert "2 weights of the recipe are not in this graph" in caplog.text


PASSES = """
import sys, torch
from torch._inductor import config

seen = []
class Users(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __call__(self, graph):
        seen.append(len(graph.nodes))
    def uuid(self):
        return None  # not cached, so that it runs

def function(x):
    return torch.relu(x) + 1

x = torch.ones(3)
assert "fp4compile" not in sys.modules  # the entry point is enough
torch.compile(function, backend="fp4compile", options={"post_grad_custom_pre_pass": Users()})(x)
assert len(seen) == 1, seen
torch.compiler.reset()
config.post_grad_custom_pre_pass = [*config.post_grad_custom_pre_pass, Users()]
torch.compile(function)(x)
assert len(seen) == 2, seen
from fp4compile.lowering.inductor import SourceHash
assert any(isinstance(p, SourceHash) for p in config.post_grad_custom_pre_pass)
"""


def test_the_backend_is_found_by_name_and_other_peoples_passes_run_beside_ours():
    result = subprocess.run([sys.executable, "-c", PASSES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
