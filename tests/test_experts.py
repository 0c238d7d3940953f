"""Stacks of experts: the op, the search of every expert on its own tokens, and the report."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fp4compile
from fp4compile import ops
from fp4compile.errors import UnsupportedOperationError
from fp4compile.formats import by_name
from fp4compile.packing import pack
from fp4compile.search import METHODS, GroupProblem
from fp4compile.search.candidates import minmax_activation
from fp4compile.search.experts import search_experts
from fp4compile.tensor import FP4Tensor

EXPERTS, K, N, TOKENS = 4, 32, 48, 320


class Experts(nn.Module):
    """A router and a stack of experts, the last of which it never takes. bfloat16: torch exports
    grouped_mm in nothing else.
    """

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transposed = transposed
        shape = (EXPERTS, K, N) if transposed else (EXPERTS, N, K)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16) / 6)

    def forward(self, x):
        chosen = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        order = chosen.argsort(stable=True)
        counts = F.one_hot(chosen, EXPERTS).sum(dim=0)
        offsets = counts.cumsum(0).to(torch.int32)
        weight = self.weight if self.transposed else self.weight.transpose(-2, -1)
        return F.grouped_mm(x[order], weight, offs=offsets)


def activations(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, K, generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("spec", "transposed"), [("w4a4", False), ("w4a16", True)])
def test_experts_are_quantized_each_on_its_tokens(method, spec, transposed, tmp_path):
    data, x = activations().bfloat16(), activations(9).bfloat16()
    reference, model = Experts(transposed).eval(), Experts(transposed).eval()
    fp4compile.quantize(model, [data], spec, method=method, progress=False)
    (site,) = model.fp4_report.sites
    assert site.shape == reference.weight.shape
    assert site.unreached_experts == (3,)
    assert "experts 3 no token" in model.fp4_report.summary()
    assert 4 < model.fp4_report.bits_per_weight < 6
    with torch.no_grad():
        got, expected = model(x).float(), reference(x).float()
    error = float((got - expected).square().sum() / expected.square().sum())
    # Fresh tokens against those of the calibration.
    assert error < 2 * site.error
    model.fp4_report.recipe.save(tmp_path / "recipe.json")
    again = fp4compile.quantize(Experts(transposed), [x], recipe=tmp_path / "recipe.json")
    assert again.fp4_report.sites[0].unreached_experts == (3,)
    assert torch.equal(again(x).float(), got)


def problem(spec: str = "w4a4") -> GroupProblem:
    """Experts whose tokens live in different channels; the last column is a token's expert."""
    x, expert = activations(), torch.arange(TOKENS) % 3
    x = x * (1 + 9 * F.one_hot(expert, K))
    from fp4compile.qparams import QuantSpec, Statistics

    sample = torch.cat((x, expert[:, None].float()), dim=1)
    statistics = Statistics(sample.abs().amax(dim=0), torch.empty(0, 0), sample, TOKENS)
    weights = {"w": torch.randn(EXPERTS, N, K, generator=torch.Generator().manual_seed(3))}
    return GroupProblem(weights, statistics, QuantSpec.preset(spec))


def test_an_experts_weight_depends_on_its_own_tokens_alone():
    first = problem("w4a16")
    found = search_experts(METHODS["fpq"], first)["w"].weight
    statistics = first.statistics
    sample = statistics.sample.clone()
    of_expert = sample[:, -1] == 1
    sample[of_expert, :-1] = sample[of_expert, :-1].flip(1)
    changed = GroupProblem(
        first.weights,
        type(statistics)(statistics.absmax, statistics.second_moment, sample, TOKENS),
        first.spec,
    )
    other = search_experts(METHODS["fpq"], changed)["w"].weight
    same = [torch.equal(a, b) for a, b in zip(found.packed, other.packed, strict=True)]
    assert same == [True, False, True, True]


def test_an_unreached_expert_has_the_codes_of_a_search_without_activations():
    first = problem("w4a16")
    found = search_experts(METHODS["minmax"], first)["w"]
    assert found.unreached == (3,)
    scale = first.weights["w"][3].abs().amax(dim=1) / by_name(found.weight.format).max_integer
    torch.testing.assert_close(found.weight.scale[3], scale)


def stack(blocks: bool = False) -> FP4Tensor:
    torch.manual_seed(2)
    codes = torch.randint(0, 16, (EXPERTS, N, K), dtype=torch.uint8)
    scale = torch.rand(EXPERTS, 1, 1) if blocks else torch.rand(EXPERTS, N)
    block_scale = torch.randint(40, 80, (EXPERTS, N, K // 16), dtype=torch.uint8)
    activation = minmax_activation(torch.full((K,), 3.0), fp4compile.TensorSpec(4))
    return FP4Tensor(
        pack(codes, 4),
        scale,
        activation.scale,
        block_scale=block_scale if blocks else None,
        weight_format="e2m1",
        activation_format="e2m1",
        block_size=16 if blocks else 0,
        reduction=K,
        transposed=True,
    )  # fmt: skip


@pytest.mark.parametrize("blocks", [False, True], ids=["channel", "block"])
def test_grouped_linear_is_linear_of_each_experts_rows(blocks):
    weight, x = stack(blocks), activations()
    offsets = torch.tensor([100, 100, 250, TOKENS - 20])
    got = F.grouped_mm(x, weight, offs=offsets)
    operand, scale = weight.operand_of(x)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        block_scale = None if weight.block_scale is None else weight.block_scale[expert]
        expected = ops.linear(
            operand[start:end], scale, weight.packed_weight[expert],
            weight.weight_scale[expert].flatten(), None, "e2m1", x.dtype, block_scale,
            weight.block_size,
        )  # fmt: skip
        assert torch.equal(got[start:end], expected)
        start = end
    assert not got[start:].any()


def test_experts_taken_by_index_multiply_one_row_each():
    weight, x = stack(), activations()[:7]
    index = torch.tensor([3, 1, 1, 0, 2, 3, 3])
    got = torch.bmm(x.unsqueeze(1), weight[index]).squeeze(1)
    order = index.argsort(stable=True)
    offsets = torch.bincount(index, minlength=EXPERTS).cumsum(0)
    assert torch.equal(got[order], F.grouped_mm(x[order], weight, offs=offsets))


def test_what_a_stack_cannot_do_is_a_clear_error():
    weight = stack()
    with pytest.raises(UnsupportedOperationError, match="one row for each"):
        torch.bmm(torch.randn(EXPERTS, 5, K), weight)
    with pytest.raises(UnsupportedOperationError, match="offs"):
        F.grouped_mm(torch.randn(5, K), weight)
    with pytest.raises(UnsupportedOperationError, match=r"\[N, K\]"):
        F.linear(torch.randn(5, K), weight)


def test_a_compiled_stack_runs_in_the_kernel_of_single_weights():
    """Many rows, few rows and none, and rows beyond the last expert."""
    weight = stack(blocks=True)
    fp4compile.load_lowerings()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, offsets: F.grouped_mm(x, weight, offs=offsets), fullgraph=True, dynamic=True
    )
    x = activations()
    for ends in ([3, 3, 150, TOKENS - 20], [0, 1, 2, 7], [0, 0, 0, 0]):
        offsets = torch.tensor(ends, dtype=torch.int32)
        got, expected = compiled(x, offsets), F.grouped_mm(x, weight, offs=offsets)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_verify_names_the_kernel_of_a_stack():
    model, x = Experts().eval(), activations().bfloat16()
    fp4compile.quantize(model, [x], "w4a4", method="minmax", progress=False)
    eager = model(x)
    torch._dynamo.reset()
    fp4compile.compile_model(model)
    assert torch.equal(model(x), eager)
    (site,) = fp4compile.verify(model, strict=True).sites
    (choice,) = model.fp4_report.kernels.values()
    assert site.kernels == (choice.target,)
    assert choice.problem.startswith(f"grouped linear E={EXPERTS} N={N} K={K}")
