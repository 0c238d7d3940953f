"""How much each token counts by gradients: what the model's outputs lose by errors there."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from models import tiny_llama, tokens
from torch import fx, nn

import fp4compile
from fp4compile.calibrate import run_calibration
from fp4compile.errors import MemoryLimitError, SpecError, UnsupportedOperationError
from fp4compile.qparams import QuantSpec, Statistics
from fp4compile.search import GroupProblem, SearchOptions
from fp4compile.search.tokens import shrunk_moment, weighted_tokens
from fp4compile.sensitivity import sensitivities, single_samples
from fp4compile.trace import trace

GRADIENT = SearchOptions(token_weights="gradient")
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """``outputs`` of 24 and more are logits: as many as three per channel."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def found(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    graph = trace(model.eval(), (batches[0],), {})
    calls = [((x,), {}) for x in batches]
    by_group = sensitivities(model, graph, enumerate(calls))
    return {group.sites[0].name: weights for group, weights in by_group.items()}


def expected(model: Two, x: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    """By the chain rule: of the labels, or signs, that batch ``number`` is given."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        hidden = model.first(x)
        y = model.last(hidden.relu())
        if y.shape[-1] >= 24:
            p = y.softmax(-1)
            label = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(x.shape[:-1])
            last = p - nn.functional.one_hot(label, y.shape[-1])
        else:
            last = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1
        first = (last @ model.last.weight) * (hidden > 0)
    return {"first.weight": first.square().mean(-1), "last.weight": last.square().mean(-1)}


def test_nothing_of_a_sample_outlives_it():
    found(Two(24), [X])
    gc.collect()
    # Each would hold the outputs of its sample.
    assert not [x for x in gc.get_objects() if isinstance(x, fx.Interpreter)]


@pytest.mark.parametrize("outputs", [4, 24], ids=["features", "logits"])
def test_they_are_squared_gradients(outputs):
    model, batches = Two(outputs), [X, 2 * X, X.flip(0)]
    got = found(model, batches)
    wanted = [expected(model, x, number) for number, x in enumerate(batches)]
    for name in ("first.weight", "last.weight"):
        together = torch.stack([each[name] for each in wanted])
        torch.testing.assert_close(torch.stack(got[name]), together / together.mean())


def test_siblings_count_alike():
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 6)

        def forward(self, x):
            return torch.cat([self.a(x), 100 * self.b(x).square()], dim=-1)

    model = Siblings()
    alone = []
    for name in ("a", "b"):
        with torch.no_grad():
            y = model.b(X)
        signs = torch.randint(0, 2, (2, 3, 10), generator=torch.Generator().manual_seed(0)) * 2 - 1
        gradient = signs[..., :4] if name == "a" else signs[..., 4:] * 200 * y
        square = gradient.to(torch.float32).square().mean(-1)
        alone.append(square / square.mean())
    ((weights,),) = found(model, [X]).values()
    torch.testing.assert_close(weights, sum(alone) / 2)


def test_the_model_is_as_it_was():
    model = Two(4)
    model.last.bias.requires_grad_(False)
    found(model, [X])
    requiring = {name for name, each in model.named_parameters() if each.requires_grad}
    assert requiring == {"first.weight", "first.bias", "last.weight"}
    assert all(each.grad is None for each in model.parameters())


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(x).detach()


def test_a_model_without_gradients_is_an_error_and_as_it_was():
    model = Detached()
    with pytest.raises(UnsupportedOperationError, match="use token_weights='power'"):
        fp4compile.quantize(model, [X], search=GRADIENT, progress=False)
    assert model.last.weight.requires_grad
    assert type(model.last.weight) is nn.Parameter


def test_samples_are_run_alone_where_they_come_first():
    model = tiny_llama(layers=1)
    ids = tokens(4, 6)
    graph = trace(model, (), {"input_ids": ids, "use_cache": False})
    parts = single_samples(graph, ((), {"input_ids": ids, "use_cache": False}))
    assert torch.equal(torch.cat([kwargs["input_ids"] for _, kwargs in parts]), ids)
    assert {len(kwargs["input_ids"]) for _, kwargs in parts} == {1}
    # Whose first dimension is what, nobody knows.
    alone = trace(Two(4).eval(), (X,), {})
    ((args, _),) = single_samples(alone, ((X,), {}))
    assert args[0] is X


def test_a_column_stays_with_its_token():
    """Padded tokens are taken out with theirs."""
    model = tiny_llama(layers=1)
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    graph = trace(model, (), call)
    group = graph.groups[0]
    seen = []

    def on_group(_, inputs):
        seen.extend(inputs)
        return {}

    column = torch.arange(10.0).view(2, 5)
    batches = [((), call)] * 2
    run_calibration(graph, batches, on_group, groups=[group], columns={group: [column, -column]})
    kept = column[mask.bool()]
    assert torch.equal(torch.stack([x[:, -1] for x in seen]), torch.stack([kept, -kept]))
    assert torch.equal(seen[0][:, :-1], seen[1][:, :-1])


def test_moments_count_tokens_by_it():
    x, sensitivity = torch.randn(40, 8), torch.rand(40)
    sensitivity[:5] = 0
    statistics = Statistics(x.abs().amax(0), torch.empty(0, 0), x, 40, sensitivity)
    spec = QuantSpec.preset("w4a4")
    problem = GroupProblem({"w": torch.randn(6, 8)}, statistics, spec, options=GRADIENT)
    weighted = x * (sensitivity / sensitivity.mean()).sqrt()[:, None]
    wanted = shrunk_moment(weighted, GRADIENT.moment_shrinkage)
    torch.testing.assert_close(weighted_tokens(problem).moment(), wanted)
    # Where no output depends on any, as on the last layer's of a cache, power decides.
    nothing = replace(statistics, sensitivity=torch.zeros(40))
    got = weighted_tokens(replace(problem, statistics=nothing)).moment()
    without = replace(problem, statistics=replace(statistics, sensitivity=None))
    assert torch.equal(got, weighted_tokens(without).moment())


@pytest.mark.parametrize("method", ["fpq", "best"])
def test_a_model_is_quantized_with_it(method):
    made = [
        fp4compile.quantize(
            tiny_llama(layers=1), [tokens(4, 24)] * 3, method=method, search=search, progress=False
        )
        for search in (GRADIENT, GRADIENT, SearchOptions())
    ]
    codes = [model.model.layers[0].mlp.down_proj.weight.packed_weight for model in made]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    assert {site.name for site in made[0].fp4_report.sites} == {
        site.name for site in made[2].fp4_report.sites
    }


def test_memory_for_gradients_is_asked_for():
    many = torch.zeros(300_000, 8).index_fill(0, torch.tensor([7]), 1.0)
    options = {"method": "minmax", "progress": False, "max_memory": "110MiB"}
    fp4compile.quantize(Two(24), [many], **options)
    with pytest.raises(MemoryLimitError, match="calibration needs more"):
        fp4compile.quantize(Two(24), [many], search=GRADIENT, **options)


def test_other_names_are_refused():
    with pytest.raises(SpecError, match="token_weights 'loss' is not one of"):
        SearchOptions(token_weights="loss")
