"""Every family of ``bench/families.py`` is traced, quantized and called; see docs/models.md."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fp4compile
from bench.families import (
    BEGIN,
    END,
    FAMILIES,
    check,
    compiles_whole,
    count_folds,
    table,
    write_table,
)
from bench.family_checks import first_output, relative_error
from fp4compile.compile import compile_model

# At w8a8 and random weights; what was measured is at most half.
LARGEST_ERROR = 0.08
# What grows with it is an optional dependency.
NEEDS = {"Llama with LoRA (peft)": "peft", "Llama with merged LoRA": "peft"}


def where_installed(name):
    """The name as a parameter, skipped without the optional ``peft``, which the dev extra has."""
    needs = NEEDS.get(name)
    absent = needs is not None and find_spec(needs) is None
    return pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"{needs} is not installed"))


@pytest.mark.parametrize("name", map(where_installed, FAMILIES))
def test_a_family_is_quantized_and_runs(name):
    result = check(name)
    assert result.quantized > 0
    assert result.kept_names == FAMILIES[name].kept
    assert 0 < result.error < LARGEST_ERROR
    assert result.generated in (None, True)
    assert result.reloaded


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        # Both LayerNorms of BERT stand before residuals: only values fold.
        ("BERT", 1),
        # All but the embeddings and what follows GELU.
        ("GPT-2", 4),
        # All but the embedding, which Gemma ties to the head.
        ("Llama", 8),
        ("Gemma 2", 8),
        # All but the embedding and what the router reads too.
        ("Mixtral", 6),
        # Norms into qkv and fc1, values into proj.
        ("a block as in timm", 3),
    ],
)
def test_folds_reach_through_attention_and_fused_projections(name, folds):
    assert count_folds(name) == folds


@pytest.mark.parametrize(
    "name", map(where_installed, ["nn.TransformerEncoder", "Llama with LoRA (peft)"])
)
def test_a_family_is_one_graph_to_dynamo(name):
    """The table of the docs has all."""
    assert compiles_whole(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "ViT", "Mixtral"])
def test_a_family_compiles_without_graph_breaks(name):
    family = FAMILIES[name]
    batch = family.batch(3)
    model = quantized(family)
    eager = first_output(model(**batch))
    model = torch.compile(model, backend="fp4compile", fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled = first_output(model(**batch))
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)
    report = compile_model(model).fp4_report
    assert set(report.kernels) == {site.name for site in report.sites if site.bias is not None}


def quantized(family):
    torch.manual_seed(0)
    model = family.build().eval()
    return fp4compile.quantize(model, [family.batch(1)], method="minmax", progress=False)


def test_a_model_under_torch_compile_stays_so_and_has_the_report():
    family = FAMILIES["under torch.compile"]
    model = family.build().eval()
    assert fp4compile.quantize(model, [family.batch(1)], progress=False) is model
    assert model.fp4_report.sites
    assert relative_error(model, model._orig_mod, family.batch(2)) == 0


def test_the_table_of_the_docs_is_the_table_of_the_code(tmp_path):
    page = tmp_path / "models.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    results = [check("nn.MultiheadAttention")]
    write_table(page, results)
    assert page.read_text() == f"before\n{BEGIN}\n{table(results)}\n{END}\nafter\n"
    docs = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    assert [name for name in FAMILIES if f"| {name} |" not in docs] == []
