"""What a program relies on besides arguments: parameters, submodules, configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp4compile.program.values import CONSTANTS, NotFlat

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Owners:
    """A module as it was when its programs were made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._dtypes: list[tuple[Tensor, torch.dtype]] = []
        self._hooks: list[dict[Any, Any]] = []
        configurations: dict[int, Any] = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers, part._modules):
                for name, value in held.items():
                    self._add(held, name, value)
            self._hooks += [getattr(part, name) for name in _HOOKS]
            configuration = getattr(part, "config", None)
            if hasattr(configuration, "__dict__"):
                configurations[id(configuration)] = configuration
        self._configurations = [
            (configuration, _constants(configuration)) for configuration in configurations.values()
        ]

    def _add(self, held: dict[str, Any], name: str, value: Any) -> None:
        self._hold(held, name, value)
        if not isinstance(value, Tensor):
            return
        if is_traceable_wrapper_subclass(value):
            # Conversions swap all that is inside; one part tells.
            inner = value.__tensor_flatten__()[0][0]
            self._hold(value.__dict__, inner, getattr(value, inner))
        else:
            self._dtypes.append((value, value.dtype))

    def _hold(self, held: dict[str, Any], name: str, value: Any) -> None:
        self._dicts.append(held)
        self._names.append(name)
        self._values.append(value)

    def unchanged(self) -> bool:
        """Whether the module has the same parts of the same dtypes, configured as before."""
        # A loop in Python over a thousand of them takes longer than a layer.
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and all(value.dtype is dtype for value, dtype in self._dtypes)
            and all(_constants(each) == before for each, before in self._configurations)
        )

    def check_hooks(self) -> None:
        """Raises NotFlat where a hook waits for calls: programs would call it only while traced."""
        if module_globals._has_any_global_hook() or any(self._hooks):
            raise NotFlat(f"a forward hook of {self._hooked()}")

    def _hooked(self) -> str:
        for name, part in self._module.named_modules():
            if any(getattr(part, hooks) for hooks in _HOOKS):
                return name or type(part).__name__
        return "all modules"


def _constants(configuration: Any) -> list[Any]:
    return [value for value in vars(configuration).values() if isinstance(value, CONSTANTS)]


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward set on its modules, tracers and all.

    Raises:
        NotFlat: it set something; a program would not.
    """
    before = {part: _attributes(part) for part in module.modules()}
    try:
        yield
    finally:
        changed = [name for part, old in before.items() for name in _restore(part, old)]
    if changed:
        raise NotFlat(f"a forward that sets {', '.join(sorted(set(changed)))}")


def _attributes(part: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    held = (vars(part), part._parameters, part._buffers, part._modules)
    return [(each, dict(each)) for each in held]


def _restore(part: nn.Module, before: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    changed = []
    for held, old in before:
        names = [name for name in held.keys() | old.keys() if held.get(name) is not old.get(name)]
        if names:
            held.clear()
            held.update(old)
        changed += [f"{type(part).__name__}.{name}" for name in names]
    return changed
