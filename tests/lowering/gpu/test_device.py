"""The pretended GPU leaves nothing behind: neither compiling nor interpreting changes what follows."""

from __future__ import annotations

import pytest
import torch

from fp4compile.errors import CompileError
from fp4compile.lowering.gpus import GPUS


def test_nothing_is_left_behind(layer, int8_operand):
    import triton
    import triton.language as tl
    from torch._dynamo.device_interface import device_interfaces, get_registered_device_interfaces

    from fp4compile.lowering.testing import compile_for, interpret

    linear, inputs = layer(32, 64), (int8_operand(3, 64), torch.rand(3, 1))
    list(get_registered_device_interfaces())  # registers them
    before = (
        [dict(vars(m)) for m in (tl, tl.core, tl.standard, torch.cuda)],
        dict(device_interfaces),
    )
    driver = triton.runtime.driver._active
    first = compile_for(linear, inputs, GPUS["sm_90"])
    interpret(linear, inputs, GPUS["sm_80"])
    after = [dict(vars(m)) for m in (tl, tl.core, tl.standard, torch.cuda)], dict(device_interfaces)
    assert before == after
    assert triton.runtime.driver._active is driver
    again = compile_for(linear, inputs, GPUS["sm_90"])
    assert [k.ptx for g in first for k in g.kernels] == [k.ptx for g in again for k in g.kernels]
    assert torch.equal(torch.compile(linear)(*inputs), linear(*inputs))  # the CPU's own lowering


def test_a_constant_in_the_graph_is_refused(layer):
    from fp4compile.lowering.testing import compile_for

    constant = torch.arange(3.0)
    with pytest.raises(Exception, match="register them as buffers") as raised:
        compile_for(
            lambda x: x + torch.tensor([1.0, 2.0, 3.0]) + constant, (constant,), GPUS["sm_90"]
        )
    assert CompileError.__name__ in repr(raised.value.__cause__ or raised.value)
