"""Inputs of decode steps: told from those of the steps before instead of being made anew.

Transformers makes masks and positions of every step out of the configuration, which takes longer
than some layers of a small model.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fp4compile.program.values import CONSTANTS

Inputs = dict[str, Any]


class Irregular(Exception):
    """Two steps that do not tell the next one; the message says why."""


class DecodeInputs:
    """Stands for the ``prepare_inputs_for_generation`` of a model of transformers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._prepare = type(model).prepare_inputs_for_generation.__get__(model)
        functools.update_wrapper(self, self._prepare)  # transformers looks at its signature
        self._loop = _Loop()

    def __reduce__(self) -> Any:
        return DecodeInputs, (self._model,)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, and in this thread, calls are steps of a loop that changes nothing else."""
        before, self._loop.steps = self._loop.steps, Steps(self._prepare)
        try:
            yield
        finally:
            self._loop.steps = before

    def __call__(self, *args: Any, **kwargs: Any) -> Inputs:
        steps = self._loop.steps
        if steps is None or len(args) != 1 or kwargs.get("next_sequence_length") != 1:
            return self._prepare(*args, **kwargs)
        return steps(*args, kwargs)


class _Loop(threading.local):
    steps: Steps | None = None


class Steps:
    """The steps of one loop: ``prepare`` makes two in a row, which tell those that follow."""

    def __init__(self, prepare: Callable[..., Inputs]) -> None:
        self._prepare = prepare
        self._asked: tuple[Tensor, Inputs] | None = None
        self._made: Inputs = {}
        self._next: NextInputs | None = None
        self._regular = True

    def __call__(self, input_ids: Tensor, arguments: Inputs) -> Inputs:
        """What ``prepare`` makes of the same."""
        before, self._asked = self._asked, (input_ids, arguments)
        follows = before is not None and _follows(*before, input_ids, arguments)
        if follows and self._next is not None:
            return self._next(input_ids)
        made, self._next = self._prepare(input_ids, **arguments), None
        if follows and self._regular:
            try:
                self._next = NextInputs(self._made, made)
            except Irregular:
                self._regular = False
        self._made = made
        return made


class NextInputs:
    """Inputs of the steps after the two that made ``before`` and ``after``.

    Positions grow by one, masks show one more column, all else stays. Raises Irregular where
    something else happened between the two.
    """

    def __init__(self, before: Inputs, after: Inputs) -> None:
        self._advance: list[Callable[[], Any]] = []
        token = {"input_ids": after.get("input_ids")}
        self._inputs = self._told({**before, **token}, after)

    def __call__(self, input_ids: Tensor) -> Inputs:
        """Those of the next step, for the last of ``input_ids``."""
        for advance in self._advance:
            advance()
        token = input_ids[:, -1:].clone(memory_format=torch.contiguous_format)
        return {**self._inputs, "input_ids": token}

    def _told(self, before: Any, after: Any) -> Any:
        if after is before or _same_constant(before, after):
            return after
        if isinstance(after, dict) and isinstance(before, dict) and list(after) == list(before):
            return {name: self._told(before[name], item) for name, item in after.items()}
        if not _same_kind(before, after):
            raise Irregular(f"a {type(before).__name__} and then a {type(after).__name__}")
        if torch.equal(before, after):
            return after
        own = after.clone()
        if after.dtype == torch.long and torch.equal(before + 1, after):
            self._advance.append(lambda: own.add_(1))
        else:
            self._advance.append(_show_next_column(before, after, own))
        return own


def _show_next_column(before: Tensor, after: Tensor, own: Tensor) -> Callable[[], None]:
    """What shows one more column of the mask ``own``, as ``after`` does than ``before``."""
    changed = (before != after).flatten(0, -2).any(0).nonzero().flatten().tolist()
    column = changed[0]
    shown, hidden = after[..., column], before[..., column:]
    one_column = len(changed) == 1 and hidden.shape[-1] > 1 and _is_uniform(shown)
    if not (one_column and _is_uniform(hidden)):
        raise Irregular("a mask does not show one more column")
    value = shown.flatten()[0].clone()

    def show() -> None:
        nonlocal column
        column += 1
        own[..., column] = value

    return show


def _is_uniform(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def _follows(ids: Tensor, arguments: Inputs, next_ids: Tensor, next_arguments: Inputs) -> bool:
    """Whether the same is asked for, one token later."""
    batch, length = ids.shape
    return (
        next_ids.shape == (batch, length + 1)
        and list(next_arguments) == list(arguments)
        and all(
            value is before or _same_constant(before, value) or _grown(name, before, value)
            for (name, value), before in zip(
                next_arguments.items(), arguments.values(), strict=True
            )
        )
    )


def _grown(name: str, before: Any, after: Any) -> bool:
    """Whether an argument has one more entry, a mask one more of the same."""
    if name not in ("position_ids", "attention_mask") or not isinstance(after, Tensor):
        return False
    grown = isinstance(before, Tensor) and after.shape[-1] == before.shape[-1] + 1
    return grown and (name == "position_ids" or torch.equal(after[..., -1], before[..., -1]))


def _same_constant(before: Any, after: Any) -> bool:
    return isinstance(after, CONSTANTS) and type(after) is type(before) and after == before


def _same_kind(before: Any, after: Any) -> bool:
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.shape == after.shape
        and before.dtype == after.dtype
    )
