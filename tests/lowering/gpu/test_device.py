"""The pretended GPU leaves nothing behind: what follows is as if it had not been."""

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
    modules = (tl, tl.core, tl.standard, torch.cuda)
    before = [dict(vars(module)) for module in modules], dict(device_interfaces)
    driver = triton.runtime.driver._active
    (first,) = compile_for(linear, inputs, GPUS["sm_90"])
    interpret(linear, inputs, GPUS["sm_80"])
    after = [dict(vars(module)) for module in modules], dict(device_interfaces)
    assert before == after
    assert triton.runtime.driver._active is driver
    (again,) = compile_for(linear, inputs, GPUS["sm_90"])
    # Not the binaries, which name the files of their sources.
    assert [k.instructions for k in first.kernels] == [k.instructions for k in again.kernels]
    assert torch.equal(torch.compile(linear)(*inputs), linear(*inputs))  # the CPU's own lowering


def test_the_generated_kernel_is_what_runs(layer, int8_operand, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    from fp4compile.lowering.testing import interpret

    launched = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *_, **__: launched.append(self.fn.__name__)
    )
    interpret(layer(32, 64), (int8_operand(3, 64), torch.rand(3, 1)), GPUS["sm_90"])
    assert launched == ["triton_tem_fused_linear_0"]


def test_a_constant_in_the_graph_is_refused(layer):
    from fp4compile.lowering.testing import compile_for

    with pytest.raises(CompileError, match="register them as buffers"):
        compile_for(lambda x: x + torch.tensor([1.0, 2.0]), (torch.ones(2),), GPUS["sm_90"])
