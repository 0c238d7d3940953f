"""What may stand between a producer and an activation whose shifts move into it, and what not."""

from __future__ import annotations

import pytest
import torch
from folds import both, decisions
from torch import nn
from torch.nn import functional as F

import fp4compile
from fp4compile.passes import Rewrite
from fp4compile.passes.fold_exponent_shifts import fold_exponent_shifts
from fp4compile.qparams import QuantSpec, TensorSpec
from fp4compile.search import SearchOptions
from fp4compile.trace import trace

X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2))
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Between(nn.Module):
    """``last(between(first(x)))``."""

    def __init__(self, between, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first, self.last = nn.Linear(16, 16), nn.Linear(width, 8)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


COMMUTING = {
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.3),
    "minus_abs": lambda y: -y.abs(),
    "divided": lambda y: y / 3,
    "divided_by_a_tensor": lambda y: y / torch.arange(1.0, 17.0, dtype=y.dtype),
    "scaled": lambda y: 0.7 * y,
    "moved": lambda y: y.movedim(1, 0).contiguous().movedim(0, 1),
    "picked": lambda y: y.view(3, 6, 2, 8)[:, :, [1]].flatten(-2).repeat(1, 1, 2),
    "repeated": lambda y: y.repeat_interleave(2, dim=1),
    "mixed_tokens": lambda y: torch.softmax(torch.eye(6, dtype=y.dtype), -1) @ y,
    "mixed_by_einsum": lambda y: torch.einsum("bkd, qk -> bqd", y, torch.eye(6, dtype=y.dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("between", COMMUTING.values(), ids=COMMUTING)
def test_what_a_power_of_two_commutes_with_keeps_the_bits(between, dtype):
    rewrite, folded, unfolded = both(lambda: Between(between), ((X.to(dtype),), {}), dtype)
    assert rewrite.folded == {"first.weight": ("last.weight",)}
    assert torch.equal(folded, unfolded)


NOT_COMMUTING = {
    "square": lambda y: y * y,
    "gelu": F.gelu,
    "sum": lambda y: y + y.flip(1),
    "own_values_and_keys": lambda y: F.scaled_dot_product_attention(torch.ones(3, 6, 16), y, y),
    # A row of the product is a sum over channels, as in token mixing.
    "einsum_over_channels": lambda y: torch.einsum("btd,td->bt", y, y[0])[..., None].expand_as(y),
    "einsum_of_squares": lambda y: torch.einsum("btd,btd->btd", y, y),
    "einsum_of_diagonals": lambda y: torch.einsum("bttd->btd", y[:, None].expand(-1, 6, -1, -1)),
    "einsum_to_a_number": lambda y: torch.einsum("btd,btd->", y, y).expand(y.shape),
    "mixed_channels_by_einsum": lambda y: torch.einsum("de,bte->btd", torch.ones(16, 16), y),
    "mixed_channels": lambda y: (torch.ones(16, 16) @ y.transpose(1, 2))[..., :4].repeat(1, 1, 4),
}


@pytest.mark.parametrize("between", NOT_COMMUTING.values(), ids=NOT_COMMUTING)
def test_what_a_power_of_two_does_not_commute_with_is_left_alone(between):
    model = Between(between).eval()
    graph = trace(model, (X,), {})
    found = decisions(model, graph)
    shift = found["last.weight"].activation.exponent_shift
    shift.fill_(1)  # so that channels agree, and only the path decides
    rewrite = fold_exponent_shifts(Rewrite(model, graph, found))
    assert not rewrite.folded
    assert rewrite.unfolded["last.weight"] == "no norm or linear produces it for this use alone"


class SquaredGamma(nn.Module):
    """A factor on gamma would count twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(16) + 1)
        self.last = nn.Linear(16, 8)

    def forward(self, x):
        return self.last(x * (self.gamma * self.gamma))


def test_a_weight_that_is_squared_takes_no_shift():
    model = SquaredGamma()
    graph = trace(model, (X,), {})
    assert not fold_exponent_shifts(Rewrite(model, graph, decisions(model, graph))).folded


class Heads(nn.Module):
    """Attention with fewer heads of keys and values than of queries."""

    def __init__(self, share, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.share, self.heads = share, heads
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 8 * heads), nn.Linear(16, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, 4, 4).transpose(1, 2)
        both = self.kv(x).view(batch, length, self.heads, 8).transpose(1, 2)
        k, v = both.chunk(2, dim=-1)
        y = self.share(q, k, v)
        return self.o(y.transpose(1, 2).reshape(batch, length, 16))


def _expanded(q, k, v):
    k, v = (
        part[:, :, None].expand(-1, -1, 4 // part.shape[1], -1, -1).reshape(q.shape)
        for part in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v)


def _repeated(q, k, v):
    k, v = (part.repeat_interleave(4 // part.shape[1], dim=1) for part in (k, v))
    return torch.softmax(q @ k.mT, dim=-1) @ v


def _einsum(q, k, v):
    q = q.unflatten(1, (2, 2))  # groups of heads, heads of a group
    scores = torch.einsum("bghqd,bgkd->bghqk", q, k)
    return torch.einsum("bghqk,bgkd->bghqd", scores.softmax(dim=-1), v).flatten(1, 2)


SHARING = {
    "einsum": (_einsum, 2),
    "expanded": (_expanded, 2),
    "repeated": (_repeated, 2),
    "enable_gqa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2),
    "one_head": (F.scaled_dot_product_attention, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("share", "heads"), SHARING.values(), ids=SHARING)
def test_shifts_of_heads_that_share_values_fold_to_the_bit(share, heads, dtype):
    rewrite, folded, unfolded = both(lambda: Heads(share, heads), ((X.to(dtype),), {}), dtype)
    assert rewrite.folded == {"kv.weight": ("o.weight",)}
    assert torch.equal(folded, unfolded)


class TwoParts(nn.Module):
    """Two linears read a part each of one projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.left = nn.Linear(16, 24), nn.Linear(8, 8)
        self.right = nn.Linear(16, 8)

    def forward(self, x):
        left, right = self.fused(x).split([8, 16], dim=-1)
        return self.left(left) + self.right(right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_parts_of_a_projection_fold_into_their_rows(dtype):
    rewrite, folded, unfolded = both(TwoParts, ((X.to(dtype),), {}), dtype)
    assert rewrite.folded == {"fused.weight": ("left.weight", "right.weight")}
    assert torch.equal(folded, unfolded)


# Of one format with shifts; E3M0 would need none.
E2M1 = TensorSpec(4, ("e2m1",), "tensor", exponent_shift=True)
SEARCHES = {
    "fpq": (QuantSpec(TensorSpec(4), E2M1, None), "fpq", "error"),
    "fpq_by_maximum": (QuantSpec(TensorSpec(4), E2M1, None), "fpq", "maximum"),
    "fpq_in_weights": (QuantSpec.preset("w4a8"), "fpq", "error"),
    "best": (QuantSpec.preset("w4a4"), "best", "error"),
}


@pytest.mark.parametrize("tie_shifts", [True, False], ids=["tied", "free"])
@pytest.mark.parametrize(("spec", "method", "choice"), SEARCHES.values(), ids=SEARCHES)
def test_tied_shifts_fold_into_shared_values_and_of_free_ones_the_report_says_who_multiplies(
    spec, method, choice, tie_shifts
):
    model = Heads(_expanded, 2).eval()
    with torch.no_grad():
        # Channels of one head differ by powers of two; one of two heads of queries picks a token,
        # the other has the mean of all.
        model.kv.weight.mul_(torch.exp2(torch.tensor([-4.0, 0, -2, -1]).repeat(4))[:, None])
        model.kv.bias.zero_()
        model.q.weight.mul_(torch.tensor([60.0, 0, 60, 0]).repeat_interleave(4)[:, None])
    data = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(3))
    options = SearchOptions(tie_shifts=tie_shifts, shift_choice=choice)
    fp4compile.quantize(model, [data], spec, method=method, search=options, progress=False)
    report = model.fp4_report
    site = next(site for site in report.sites if site.name == "o.weight")
    heads = report.recipe.sites["o.weight"].activation.exponent_shift.view(2, 2, 4)
    assert heads.any()
    if tie_shifts:
        assert torch.equal(heads[:, 0], heads[:, 1])
        assert (site.shift_folded_into, site.shift_fused_because) == ("kv.weight", None)
        assert "heads that share values" not in report.summary()
    else:
        assert not torch.equal(heads[:, 0], heads[:, 1])
        assert site.shift_folded_into is None
        assert "heads that share values" in site.shift_fused_because
        assert "heads that share values" in report.summary()
