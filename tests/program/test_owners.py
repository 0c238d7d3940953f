"""What programs rely on besides arguments is noticed; what they would not do is declined."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4compile.program.dispatch import Dispatcher
from fp4compile.program.owners import Owners, attributes_kept
from fp4compile.program.program import CompiledRegion
from fp4compile.program.regions import Region
from fp4compile.program.values import NotFlat


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.config = SimpleNamespace(scale=2.0, unknown=object())
        self.register_buffer("seen", torch.zeros(()))
        self._compiled_call_impl = None  # as after compiling, a name of its own

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.config.scale


def run_eagerly(region: Region, _: Any) -> CompiledRegion:
    module = torch.fx.GraphModule({}, region.graph)
    return CompiledRegion(lambda arguments: module(*arguments))


def dispatcher(module: nn.Module) -> Dispatcher:
    return Dispatcher(module, run_eagerly, lambda *args, **kwargs: "elsewhere")


CHANGES: dict[str, Callable[[Small], Any]] = {
    "configuration": lambda m: setattr(m.config, "scale", 3.0),
    "parameter": lambda m: setattr(m.inner, "weight", nn.Parameter(torch.ones(4, 4))),
    "module": lambda m: setattr(m, "inner", nn.Linear(4, 4)),
    "buffer": lambda m: setattr(m, "seen", torch.ones(())),
    "dtype": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name):
    module = Small()
    owners = Owners(module)
    assert owners.unchanged()
    CHANGES[name](module)
    assert not owners.unchanged()


@pytest.mark.parametrize("name", [n for n in CHANGES if n not in ("dtype", "buffer")])
def test_a_changed_model_computes_anew(name):
    module, x = Small(), torch.randn(3, 4)
    programs = dispatcher(module)
    for change in (lambda _: None, CHANGES[name]):
        change(module)
        torch.testing.assert_close(programs(x), module(x))


class Counts(Small):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Accumulates(Small):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.sum()
        return super().forward(x)


class Branches(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Hooked(Small):
    def __init__(self) -> None:
        super().__init__()
        self.inner.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counts, "a forward that sets Counts.calls"),
        (Accumulates, "a forward that replaces seen"),
        (Branches, "it cannot be traced"),
        (Hooked, "a forward hook of inner"),
    ],
)
def test_forwards_that_a_program_would_not_repeat_go_elsewhere(kind, reason, caplog):
    module = kind()
    before = dict(vars(module)), dict(module._buffers)
    with caplog.at_level(logging.WARNING, logger="fp4compile"):
        assert dispatcher(module)(torch.ones(3, 4)) == "elsewhere"
    assert reason in caplog.text
    assert (dict(vars(module)), dict(module._buffers)) == before


def test_what_cannot_be_traced_is_tried_once():
    traced, x = [], torch.ones(3, 4)

    class Noted(Branches):
        def forward(self, x: Tensor) -> Tensor:
            traced.append(type(x))
            return super().forward(x)

    programs = dispatcher(Noted())
    assert [programs(x), programs(x), programs(-x)] == ["elsewhere"] * 3
    assert len(traced) == 1


def test_a_mistake_of_the_caller_leaves_the_kind_traceable():
    module = Small()
    programs = Dispatcher(module, run_eagerly, module.forward)
    with pytest.raises(RuntimeError):
        programs(torch.ones(3, 5))
    programs(torch.ones(3, 4))
    assert programs.programs == 1


def test_attributes_are_put_back_after_an_error():
    module = Small()
    with pytest.raises(NotFlat, match=r"sets Linear\.extra"), attributes_kept(module):
        module.inner.extra = 1
    assert not hasattr(module.inner, "extra")


def test_named_and_positional_arguments_are_one_kind():
    module, x = Small(), torch.randn(3, 4)
    programs = dispatcher(module)
    assert torch.equal(programs(x), programs(x=x))
    assert programs.programs == 1


def test_an_argument_given_twice_is_not_taken():
    assert dispatcher(Small())(torch.ones(3, 4), x=torch.ones(3, 4)) == "elsewhere"


def test_a_stance_of_torch_turns_programs_off():
    programs = dispatcher(Small())
    with torch.compiler.set_stance("force_eager"):
        assert programs(torch.ones(3, 4)) == "elsewhere"
    assert programs(torch.ones(3, 4)).shape == (3, 4)


def test_in_a_steady_section_the_module_is_looked_at_once(monkeypatch):
    looked = []
    monkeypatch.setattr(Owners, "unchanged", lambda self: bool(looked.append(self)) or True)
    programs, x = dispatcher(Small()), torch.randn(3, 4)
    programs(x)
    with programs.steady():
        for _ in range(3):
            programs(x)
    assert len(looked) == 1
    programs(x)
    assert len(looked) == 2
