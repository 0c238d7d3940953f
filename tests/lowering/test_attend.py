"""Compiled fp4::attend against torch's attention."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.lowering.choice import SEEN

Make = Callable[..., Any]

attend = torch.ops.fp4.attend


@pytest.mark.parametrize(
    ("rows", "head", "dtype", "mask_shape"),
    [
        (1, 64, torch.float32, (1, 1, 1)),
        (3, 64, torch.bfloat16, (2, 1, 1)),
        (5, 20, torch.float32, (2, 3, 5)),
        (2, 7, torch.float16, None),
        (65, 64, torch.float32, (1, 1, 65)),
        (200, 80, torch.bfloat16, (2, 1, 200)),
        (200, 7, torch.bfloat16, (2, 3, 200)),
        (20, 20, torch.float16, (1, 3, 1)),
        (40, 128, torch.float32, None),
        (40, 18, torch.bfloat16, "causal"),
        (500, 64, torch.float32, "causal"),
    ],
)
def test_equals_eager(
    compiled: Make,
    rows: int,
    head: int,
    dtype: torch.dtype,
    mask_shape: tuple[int, ...] | str | None,
) -> None:
    causal = mask_shape == "causal"

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(query, key, value, mask, 0.3, causal, rows > 50) + 1

    fast = compiled(run)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for length, threads in ((3, 1), (40, 1), (700, 2)):
        torch.set_num_threads(threads)
        query = torch.randn(2, 3, rows, head).to(dtype)
        key, value = torch.randn(2, 2, 3, length, head).to(dtype)
        mask = None
        if isinstance(mask_shape, tuple):
            hidden = torch.rand(*mask_shape, length) < 0.4
            # Whole panels of keys, too, and of the first rows all but one.
            hidden[..., 100:400] = True
            hidden[..., :7, 1:] = True
            hidden[..., 0] = False
            mask = torch.where(hidden, -torch.inf, torch.randn(hidden.shape)).to(dtype)
        torch.testing.assert_close(
            fast(query, key, value, mask),
            run(query, key, value, mask),
            rtol=tolerance,
            atol=tolerance,
        )
    assert {choice.target for choice in SEEN} == {"cpp"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_free_rows_do_not_change_it(compiled: Make, dtype: torch.dtype) -> None:
    """A mask of zeros, or none; one thread, or two: the same bits."""
    query, key, value = torch.randn(3, 1, 2, 300, 64).to(dtype)
    fast = compiled(lambda mask: attend(query, key, value, mask, 0.125))
    results = []
    for mask in (None, torch.zeros(1, 1, 300, 300, dtype=dtype)):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fast(mask))
    assert all(torch.equal(result, results[0]) for result in results)


def before_a_guard(values: Tensor) -> Tensor:
    """A copy that ends where memory may not be read: one byte further is a crash."""
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
    offset = size - values.nbytes
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return copy.view(values.shape).copy_(values)


@pytest.mark.parametrize("rows", [3, 23])
@pytest.mark.parametrize(
    ("head", "dtype"), [(20, torch.float32), (18, torch.bfloat16), (7, torch.float16)]
)
def test_reads_nothing_behind_its_tensors(
    compiled: Make, rows: int, head: int, dtype: torch.dtype
) -> None:
    query = torch.randn(1, 2, rows, head).to(dtype)
    key, value = torch.randn(2, 1, 2, 45, head).to(dtype)
    mask = torch.randn(1, 1, rows, 45).to(dtype)
    guarded = [before_a_guard(tensor) for tensor in (query, key, value, mask)]
    fast = compiled(lambda *tensors: attend(*tensors, 0.3))
    assert torch.equal(fast(*guarded), fast(query, key, value, mask))


def test_nothing_to_attend_to(compiled: Make) -> None:
    key = torch.randn(1, 1, 4, 16)
    mask = torch.full((1, 1, 1, 4), -torch.inf)
    fast = compiled(lambda query: attend(query, key, key, mask, 1.0))
    assert torch.equal(fast(torch.randn(1, 1, 2, 16)), torch.zeros(1, 1, 2, 16))
    assert torch.equal(fast(torch.randn(1, 1, 30, 16)), torch.zeros(1, 1, 30, 16))
