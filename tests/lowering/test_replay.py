"""Recorded kernels compute again, by one native call, what the generated code computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fp4compile import lowering


def compiled(function: Any, *inputs: Tensor) -> Any:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(each) for each in inputs]
    with mode:
        graph: fx.Graph = make_fx(function)(*fakes).graph
    return lowering.compile_region(graph, mode)


def norm(x: Tensor, y: Tensor) -> list[Tensor]:
    scaled = x / x.square().sum(1, keepdim=True)
    return [scaled.amax(0), scaled * y.sum()]


@pytest.fixture(scope="module")
def region() -> Any:
    return compiled(norm, torch.ones(5, 8), torch.ones(3))


def test_kernels_compute_again_what_the_code_did(region):
    x, y = torch.randn(5, 8), torch.randn(3)
    with lowering.Recording([region]) as recording:
        results = region([x, y])
    assert recording.obstacle is None
    replay = recording.replay()
    for _ in range(3):
        x.normal_()
        y.normal_()
        replay()
        torch.testing.assert_close(list(results), norm(x, y))


def test_what_a_kernel_throws_is_raised():
    x, rows = torch.randn(5, 8), torch.tensor([1, 4])
    region = compiled(lambda x, rows: [x[rows] + 1], x, rows)
    with lowering.Recording([region]) as recording:
        (result,) = region([x, rows])
    replay = recording.replay()
    rows[0] = 2
    replay()
    assert torch.equal(result, x[[2, 4]] + 1)
    rows[0] = 7
    with pytest.raises(RuntimeError, match="out of bounds"):
        replay()


def test_recording_leaves_the_code_as_it_was(region):
    with lowering.Recording([region]) as recording:
        region([torch.randn(5, 8), torch.randn(3)])
    before = len(recording.tensors)
    assert before > 0
    region([torch.randn(5, 8), torch.randn(3)])
    assert len(recording.tensors) == before


def test_an_operator_that_is_no_kernel_is_an_obstacle():
    region = compiled(lambda x: [torch.linalg.inv(x) + 1], torch.eye(4))
    with lowering.Recording([region]) as recording:
        region([torch.eye(4)])
    assert "linalg" in str(recording.obstacle)
