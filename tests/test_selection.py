"""``targets=`` and ``ignore=``: which weights are quantized, and what the report says of others."""

from __future__ import annotations

import re

import pytest
import torch
from models import TinyLanguageModel
from torch import nn

import fp4compile
from fp4compile.errors import SelectionError
from fp4compile.selection import select
from fp4compile.trace import trace

CALL = TinyLanguageModel.dummy_inputs


@pytest.fixture(scope="module")
def traced():
    model = TinyLanguageModel().eval()
    return model, trace(model, (), CALL)


SELECTORS = {
    "glob_on_modules": ("*.up_proj", r"\.up_proj\."),
    "glob_on_weights": ("lm_head.weight", r"^lm_head"),
    "regex": (r"re:layers\.1\..*(gate|down)", r"layers\.1\.mlp\.(gate|down)"),
    "class": (nn.Embedding, r"embed_tokens"),
    "predicate": (lambda name, module: getattr(module, "out_features", 0) == 257, r"^lm_head"),
}


@pytest.mark.parametrize(("selector", "names"), SELECTORS.values(), ids=SELECTORS)
def test_targets_and_ignore_divide_the_sites(traced, selector, names):
    model, graph = traced
    everything = {site.name for site in graph.sites}
    matching = {name for name in everything if re.search(names, name)}
    assert matching
    chosen, left_out = select(graph, model, [selector], None)
    assert {site.name for site in chosen} == matching
    assert left_out == dict.fromkeys(everything - matching, "not in targets")
    chosen, left_out = select(graph, model, None, [selector])
    assert {site.name for site in chosen} == everything - matching
    assert left_out == dict.fromkeys(matching, "in ignore")


def test_what_is_ignored_is_so_among_targets_too(traced):
    model, graph = traced
    chosen, _ = select(graph, model, [nn.Linear], ["lm_head", lambda name, _: "layers.0" in name])
    found = {site.name for site in chosen}
    assert found == {f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}


@pytest.mark.parametrize("selector", ["*.no_proj", "re:no", nn.Conv2d, lambda *_: False])
@pytest.mark.parametrize("role", ["targets", "ignore"])
def test_a_selector_that_matches_nothing_is_refused(traced, selector, role):
    model, graph = traced
    both = {"targets": None, "ignore": None, role: [selector]}
    with pytest.raises(SelectionError, match=r"matches none of the 8 sites"):
        select(graph, model, **both)


def test_the_report_explains_every_weight_that_stayed():
    model = TinyLanguageModel().eval()
    before = model.lm_head.weight.detach().clone()
    fp4compile.quantize(
        model, [CALL], method="minmax", targets=[nn.Linear], ignore=["lm_head"], progress=False
    )
    report = model.fp4_report
    assert report.skipped == {
        "model.embed_tokens.weight": "not in targets",
        "lm_head.weight": "in ignore",
    }
    assert "in high precision: lm_head.weight: in ignore" in report.summary()
    assert torch.equal(model.lm_head.weight, before)
