"""The breadth-first run sees what the model computes; observers merge exactly."""

from __future__ import annotations

import pytest
import torch
from models import tiny_llama, tokens

from fp4compile.calibrate import run_calibration
from fp4compile.errors import CalibrationDataError, NonFiniteError
from fp4compile.observers import AbsMaxObserver, SampleObserver, SecondMomentObserver, observe
from fp4compile.trace import trace


def call(seed: int, **more):
    return (), {"input_ids": tokens(seed=seed), "use_cache": False, **more}


def test_inputs_are_those_of_the_modules():
    model = tiny_llama()
    graph = trace(model, *call(1))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(site.name.rpartition(".")[0]).register_forward_pre_hook(
            lambda _module, args, name=site.name: seen.update({name: args[0]})
        )
        for site in graph.sites[1:]
    ]
    with torch.no_grad():
        model(**call(2)[1])
    for handle in handles:
        handle.remove()
    found = {}

    def on_group(group, inputs):
        x = next(inputs)
        found.update({site.name: x for site in group.sites})
        return {}

    with torch.no_grad():
        run_calibration(graph, [call(2)], on_group)
    for name, expected in seen.items():
        torch.testing.assert_close(found[name], expected.flatten(0, 1))


def test_replacements_change_what_later_groups_see():
    model = tiny_llama()
    graph = trace(model, *call(1))
    norms = []

    def on_group(group, inputs):
        norms.append(float(next(inputs).abs().sum()))
        linears = [node for site in group.sites for node in site.linears]
        return {node: lambda x, w, *_: torch.zeros(*x.shape[:-1], w.shape[0]) for node in linears}

    with torch.no_grad():
        run_calibration(graph, [call(1)], on_group)
    attention_output = norms[1]
    assert norms[0] > 0
    assert attention_output == 0


def test_padded_tokens_do_not_count():
    model = tiny_llama()
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[1, 10:] = 0
    graph = trace(model, *call(1, attention_mask=mask))
    counts = []
    with torch.no_grad():
        run_calibration(
            graph,
            [call(1, attention_mask=mask)],
            lambda _group, xs: counts.append(len(next(xs))) or {},
        )
    assert set(counts) == {4 * 24 - 14}


def test_other_arguments_than_traced_are_refused():
    model = tiny_llama()
    graph = trace(model, *call(1))
    with pytest.raises(CalibrationDataError, match="same arguments"):
        run_calibration(graph, [call(1, attention_mask=torch.ones(4, 24))], lambda *_: {})


def test_infinite_activations_are_an_error_that_names_the_site():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = torch.inf
    graph = trace(model, *call(1))
    with pytest.raises(NonFiniteError, match="q_proj"), torch.no_grad():
        run_calibration(graph, [call(1)], lambda *_: {})


def test_observers_merge_to_what_one_would_have_seen():
    x = torch.randn(100, 7)
    whole, first, second = (SecondMomentObserver(7) for _ in range(3))
    whole.update(x)
    first.update(x[:40])
    second.update(x[40:])
    first.merge(second)
    torch.testing.assert_close(first.value, whole.value)
    torch.testing.assert_close(whole.value, x.t() @ x / 100)
    largest, other = AbsMaxObserver(7), AbsMaxObserver(7)
    largest.update(x[:40])
    other.update(x[40:])
    largest.merge(other)
    assert torch.equal(largest.value, x.abs().amax(dim=0))


def test_a_sample_is_uniform_reproducible_and_complete_when_small():
    x = torch.arange(1000.0)[:, None]
    picked = torch.zeros(1000)
    for seed in range(60):
        observer = SampleObserver(1, 100, seed)
        for part in x.split(130):
            observer.update(part)
        assert observer.value.shape == (100, 1)
        assert len(observer.value.unique()) == 100
        picked[observer.value.flatten().to(torch.int64)] += 1
    # 60 draws of a tenth: every quarter of the stream is picked 1500 times, within 4 sigma.
    quarters = picked.view(4, 250).sum(dim=1)
    assert bool((quarters - 1500).abs().max() < 4 * (1500 * 0.9) ** 0.5)
    assert torch.equal(observe([x[:50], x[50:90]]).sample, x[:90])
