"""What counts as a product with a weight: einsum, transposes, and convolutions that tile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fp4compile
from fp4compile.errors import UnsupportedOperationError
from fp4compile.weight_uses import convolution_reason, einsum_transposed, patches

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d, F.conv1d, (3, 17), 4),
    "conv2d": (nn.Conv2d, F.conv2d, (3, 9, 8), (4, 2)),
    "conv3d": (nn.Conv3d, F.conv3d, (2, 4, 5, 6), (2, 2, 3)),
    "pointwise": (nn.Conv2d, F.conv2d, (3, 5, 4), 1),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_that_tiles_is_a_linear_of_its_patches(kind):
    _, function, size, window = CONVOLUTIONS[kind]
    dims = len(size) - 1
    window = (window,) * dims if isinstance(window, int) else window
    x = torch.randn(2, *size, dtype=torch.float64)
    weight = torch.randn(5, size[0], *window, dtype=torch.float64)
    got = F.linear(patches(x, window), weight.flatten(1)).movedim(-1, 1)
    torch.testing.assert_close(got, function(x, weight, stride=window))
    assert convolution_reason(window, window) is None


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_quantized_convolution_is_called_like_any_other(kind):
    build, _, size, window = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build(size[0], 16, window, stride=window)).eval()
    x = torch.randn(6, *size)
    expected = model(x)
    fp4compile.quantize(model, [torch.randn(8, *size)], "w8a8", progress=False)
    (site,) = model.fp4_report.sites
    assert site.shape == (16, size[0], *model[0].kernel_size)
    got = model(x)
    assert (got - expected).square().sum() < 1e-2 * expected.square().sum()
    assert torch.equal(model(x[0]), got[0])
    assert model[0].weight.dequantize().shape == model[0].weight.shape


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 3, "padding": 1}, "overlap"),
        ({"kernel_size": 2, "stride": 2, "padding": 1}, "padding"),
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, "dilation"),
        ({"kernel_size": 2, "stride": 2, "groups": 4}, "groups"),
    ],
    ids=["overlap", "padding", "dilation", "groups"],
)
def test_other_convolutions_stay_and_say_why(options, reason):
    model = nn.Sequential(nn.Conv2d(4, 8, **options), nn.Flatten(1), nn.LazyLinear(5))
    x = torch.randn(3, 4, 6, 6)
    model(x)
    fp4compile.quantize(model, [x], "w4a8", method="minmax", progress=False)
    assert reason in model.fp4_report.skipped["0.weight"]
    assert [site.name for site in model.fp4_report.sites] == ["2.weight"]


@pytest.mark.parametrize(
    ("equation", "transposed"),
    [
        ("btd,hd->bth", False),
        ("... d, dh -> ... h", True),
        ("bi,ij->bj", True),
        ("btd,hd->bht", None),
        ("btd,dhk->bthk", None),
        ("bdt,hd->bth", None),
        ("bd,d->b", None),
    ],
)
def test_einsum_is_read_as_a_product_or_not_at_all(equation, transposed):
    assert einsum_transposed(equation) is transposed
    if transposed is not None:
        labels = equation.replace(" ", "").split("->")[0].split(",")
        x, weight = torch.randn(2, 3, 4), torch.randn(4, 4)
        x = x[0] if len(labels[0]) == 2 else x
        expected = x @ (weight if transposed else weight.t())
        torch.testing.assert_close(torch.einsum(equation, x, weight), expected)


def test_a_quantized_weight_in_another_einsum_is_refused():
    model = fp4compile.quantize(nn.Linear(8, 8), [torch.randn(4, 8)], progress=False)
    with pytest.raises(UnsupportedOperationError, match="no product"):
        torch.einsum("bd,hd->hb", torch.randn(2, 8), model.weight)
