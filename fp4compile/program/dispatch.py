"""Run a module's calls as compiled programs; calls that none can take go another way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame

from fp4compile.generated import GeneratedGraph
from fp4compile.program.capture import Capture, capture
from fp4compile.program.owners import Owners
from fp4compile.program.program import CompileRegion, Program, Record
from fp4compile.program.repeat import Pattern
from fp4compile.program.values import (
    CacheMemo,
    Flattened,
    NotFlat,
    argument_names,
    initialize_caches,
)

logger = logging.getLogger(__name__)


@dataclass
class _Section:
    """A steady section: the owners that were checked in it, and the last call with its program."""

    owners: Owners | None = None
    last: tuple[Pattern, Program] | None = None


class _Steady(threading.local):
    """The steady section that this thread is in, if any."""

    section: _Section | None = None


class _Untraceable(NotFlat):
    """A kind of call that cannot be traced."""

    def __init__(self, key: Any, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class Dispatcher:
    """Calls ``module`` through programs compiled on first use; ``otherwise`` takes the rest.

    ``record``: makes what records the kernels of compiled regions, so that steps are repeated.
    """

    def __init__(
        self,
        module: nn.Module,
        compile_region: CompileRegion,
        otherwise: Callable[..., Any],
        record: Record | None = None,
    ) -> None:
        self._module, self._compile_region, self._record = module, compile_region, record
        self._otherwise = otherwise
        self._names = argument_names(module)
        # By key: sizes decide which of a list takes a call.
        self.by_kind: dict[Any, list[Program]] = {}
        self._untraceable: dict[Any, str] = {}  # by key too: tracing takes seconds
        self._owners: Owners | None = None
        self._memo = CacheMemo()
        self._steady = _Steady()
        self._declined: set[str] = set()

    @property
    def programs(self) -> int:
        """How many were compiled."""
        return sum(map(len, self.by_kind.values()))

    @property
    def generated(self) -> list[GeneratedGraph]:
        """The code of every program."""
        return [program.generated for known in self.by_kind.values() for program in known]

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, and in this thread, only the first call looks whether the module has changed."""
        before, self._steady.section = self._steady.section, _Section()
        try:
            yield
        finally:
            self._steady.section = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch.export or an outer torch.compile
            return self._module._call_impl(*args, **kwargs)
        if _dynamo_is_off():
            return self._otherwise(*args, **kwargs)
        named = dict(zip(self._names, args, strict=False))
        if named.keys().isdisjoint(kwargs):  # else the forward says what is wrong
            args, kwargs = args[len(named) :], {**named, **kwargs}
        try:
            program, flat = self._repeated(args, kwargs) or self._found(args, kwargs)
        except NotFlat as reason:
            self._decline(str(reason))
            result = self._otherwise(*args, **kwargs)
            if isinstance(reason, _Untraceable):  # and not the caller's mistake
                self._untraceable[reason.key] = str(reason)
            return result
        with torch.no_grad():
            return program(flat)

    def _repeated(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, Flattened] | None:
        """The program of the call before in a steady section, where this call is like that one."""
        section = self._steady.section
        if section is None or section.last is None or section.owners is not self._owners:
            return None
        if torch.is_autocast_enabled("cpu"):
            return None
        pattern, program = section.last
        flat = pattern.flatten((self._module.training, args, kwargs))
        return None if flat is None else (program, flat)

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Flattened]:
        initialize_caches(self._module, args, kwargs)
        if torch.is_autocast_enabled("cpu"):
            raise NotFlat("autocast")
        call = (self._module.training, args, kwargs)
        flat = Flattened(call, self._memo)
        program = self._program(flat, args, kwargs)
        if self._steady.section is not None:
            self._steady.section.last = Pattern(call, flat), program
        return program, flat

    def _program(self, flat: Flattened, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        section = self._steady.section
        if section is None or section.owners is not self._owners or self._owners is None:
            self._look_at_module()
        known = self.by_kind.setdefault(flat.key, [])
        for program in known:
            if program.takes(flat):
                return program
        if flat.key in self._untraceable:
            raise NotFlat(self._untraceable[flat.key])
        captured = _captured(self._module, args, kwargs, flat)
        program = Program(captured, self._compile_region, self._record)
        known.append(program)
        logger.info(
            "compiled a call of %d regions, %d of them different", program.regions, program.kernels
        )
        return program

    def _look_at_module(self) -> None:
        if self._owners is None or not self._owners.unchanged():
            self.by_kind.clear()
            self._untraceable.clear()
            self._owners = Owners(self._module)
        self._owners.check_hooks()
        if self._steady.section is not None:
            self._steady.section.owners = self._owners

    def _decline(self, reason: str) -> None:
        if reason not in self._declined:
            self._declined.add(reason)
            logger.warning(
                "a call of %s is compiled by Dynamo, slower to start and to run than a program: %s",
                type(self._module).__name__,
                reason,
            )


def _captured(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], flat: Flattened
) -> Capture:
    try:
        return capture(module, args, kwargs, flat)
    except NotFlat as error:
        raise _Untraceable(flat.key, str(error)) from error
    except Exception as error:
        # Whatever a forward does that cannot be traced; where the forward itself is wrong, it will
        # raise the same on its other way.
        reason = str(error).strip().partition("\n")[0]
        text = f"it cannot be traced: {type(error).__name__}: {reason}"
        raise _Untraceable(flat.key, text) from error


def _dynamo_is_off() -> bool:
    """By ``torch.compiler.set_stance`` or an environment variable of torch's, as for debugging."""
    return bool(eval_frame._stance.stance != "default" or dynamo_config.disable)
