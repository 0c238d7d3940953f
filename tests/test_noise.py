"""The weight that is best for a noisy input: no change of it lowers the error."""

from __future__ import annotations

import pytest
import torch

from fp4compile.formats import by_name
from fp4compile.numerics import scale_for_max
from fp4compile.observers import observe
from fp4compile.qparams import ActivationQParams, QuantSpec
from fp4compile.search import GroupProblem, by_method
from fp4compile.search.candidates import apply_activation
from fp4compile.search.noise import noisy_inputs
from fp4compile.search.problem import SearchOptions
from fp4compile.search.tokens import weighted_tokens
from fp4compile.weights import dequantized, for_activation

CHANNELS = 24


def correlated(tokens: int = 4096, rank: int = 4) -> torch.Tensor:
    """Activations that a few directions explain: the noise of the rest can be averaged out."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(rank, CHANNELS, generator=generator)
    x = torch.randn(tokens, rank, generator=generator) @ mixing
    return x + 0.05 * torch.randn(tokens, CHANNELS, generator=generator)


def problem(x: torch.Tensor, spec: str = "w4a4", **options) -> GroupProblem:
    weight = torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(1))
    return GroupProblem(
        {"w": weight}, observe([x]), QuantSpec.preset(spec), options=SearchOptions(**options)
    )


def rounded_to(name: str, x: torch.Tensor) -> ActivationQParams:
    return ActivationQParams(name, "tensor", scale_for_max(x.abs().amax(), by_name(name)))


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "e2m3", "e4m3"])
def test_no_step_from_the_best_weight_lowers_the_error(name):
    p = problem(correlated(), sink_power=float("inf"), weight_sink_power=float("inf"))
    tokens = weighted_tokens(p)
    activation = rounded_to(name, tokens.x)
    moment = tokens.x.t() @ tokens.x
    inputs = noisy_inputs(tokens, moment, activation)
    w = p.weights["w"]
    best = inputs.best_weight(w)
    # By the model E|v x_hat - w x|^2 is v A v^T - 2 v B^T w^T + const: A v^T = B w^T at its least.
    x_hat = apply_activation(tokens.x, activation)
    gain = (tokens.x * x_hat).sum(dim=0) / tokens.x.square().sum(dim=0)
    gradient = best @ inputs.moment - w @ (moment * gain)
    assert gradient.abs().max() < 1e-3 * (w @ moment).abs().max()
    # The model keeps what rounding does to every channel's power.
    torch.testing.assert_close(
        inputs.moment.diagonal(), x_hat.square().sum(dim=0), rtol=1e-4, atol=1e-3
    )


def test_it_averages_the_noise_of_correlated_channels():
    x = correlated()
    p = problem(x)
    tokens = weighted_tokens(p)
    activation = rounded_to("e2m1", x)
    w, x_hat = p.weights["w"], apply_activation(x, activation)
    best = noisy_inputs(tokens, tokens.moment(), activation).best_weight(w)
    exact = x @ w.t()
    errors = [float((x_hat @ v.t() - exact).square().mean()) for v in (best, w)]
    assert errors[0] < 0.7 * errors[1]


def test_exact_inputs_change_nothing():
    p = problem(correlated())
    tokens = weighted_tokens(p)
    inputs = noisy_inputs(tokens, tokens.moment(), None)
    assert inputs.best_weight(p.weights["w"]) is p.weights["w"]
    integers = torch.randint(-6, 7, (512, CHANNELS)).float()  # what e2m1 holds, times 1
    held = integers.where(integers.abs() != 5, torch.zeros(()))
    seen = weighted_tokens(problem(held))
    activation = ActivationQParams("e2m1", "tensor", torch.tensor(0.5))
    inputs = noisy_inputs(seen, seen.moment(), activation)
    torch.testing.assert_close(
        inputs.best_weight(p.weights["w"]), p.weights["w"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("method", ["fpq", "best"])
def test_methods_profit(method):
    """Weight and activation rounded are better than the given weight on the same activation."""
    x = correlated()
    p = problem(x)
    w, site = p.weights["w"], by_method(method).search_group(p)["w"]
    x_hat, exact = apply_activation(x, site.activation), x @ w.t()
    working = for_activation(w, site.activation)
    errors = [
        float((x_hat @ v.t() - exact).square().mean())
        for v in (dequantized(working, site.weight), working)
    ]
    assert errors[0] < errors[1]
