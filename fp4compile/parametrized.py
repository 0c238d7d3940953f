"""Weights that parametrizations (``torch.nn.utils.parametrize``) compute in every call: once.

A quantized weight is a constant, so nothing is left to compute. What is not quantized gets its
parametrization back.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_HELD = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class _Parametrized:
    """A module as it was: torch gives it a class of its own, and holds what computes the tensors in
    a submodule. ``held``: its dicts of parameters, buffers and submodules, which nobody changes.
    """

    module: nn.Module
    kind: type[nn.Module]
    held: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> _Parametrized:
        return cls(module, type(module), {name: vars(module)[name] for name in _HELD})

    def restore(self) -> None:
        vars(self.module).update(self.held)
        self.module.__class__ = self.kind


class ComputedOnce:
    """The modules of a model whose tensors were computed in every call."""

    def __init__(self) -> None:
        self._modules: dict[str, _Parametrized] = {}

    def compute(self, model: nn.Module) -> None:
        """Make plain tensors of all that are computed."""
        for name, module in list(model.named_modules()):
            if parametrize.is_parametrized(module):
                self._modules[name] = _Parametrized.of(module)
                _compute(module)

    def restore(self, but: Container[str] = ()) -> None:
        """Give the modules their parametrizations back, but those of the tensors named."""
        for name, was in self._modules.items():
            tensors = was.held["_modules"]["parametrizations"]
            if not any(f"{name}.{tensor}".removeprefix(".") in but for tensor in tensors):
                was.restore()


@contextmanager
def computed_once(model: nn.Module) -> Iterator[ComputedOnce]:
    """Every parametrized tensor of ``model`` is a plain one inside. A failure restores all; where
    there is none, the caller does.
    """
    computed = ComputedOnce()
    try:
        computed.compute(model)
        yield computed
    except BaseException:  # of Ctrl-C too, in minutes of calibration; raised again
        computed.restore()
        raise


def _compute(module: nn.Module) -> None:
    tensors: Any = module.parametrizations
    values = {name: getattr(module, name).detach() for name in tensors}
    # As torch.nn.utils.parametrize.remove_parametrizations does, which changes the originals too.
    module.__class__ = type(module).__bases__[0]
    vars(module).update({name: dict(vars(module)[name]) for name in _HELD})
    del module._modules["parametrizations"]
    for name, value in values.items():
        held = next(tensors[name].parameters(), None)
        if held is None:
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value, held.requires_grad))
