"""Move 2^-exponent_shift from the activation into what produces it, where that is exact.

A power of two commutes with every rounding, so the producer may yield ``x * 2^-shift`` itself:
a norm through its gamma (and beta), also where the graph adds 1 to it, or a linear through its
output rows and bias. Elsewhere the multiplication is part of the kernel that rounds the activation.
LLM-FP4, section 3.3: "re-parameterised as the exponential bias of the weights".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fp4compile.numerics import power_of_two
from fp4compile.passes.plan import Rewrite, can_shift
from fp4compile.passes.producers import Producer, find_producer
from fp4compile.qparams import SiteQParams
from fp4compile.trace import Group, Site


def fold_exponent_shifts(rewrite: Rewrite) -> Rewrite:
    """Fold the shifts of every group whose producer can take them exactly; else say why not."""
    for group in rewrite.graph.groups:
        folded = _folded(rewrite, group)
        if isinstance(folded, Rewrite):
            rewrite = folded
        else:
            reasons = {site.name: folded for site in group.sites}
            rewrite = replace(rewrite, unfolded={**rewrite.unfolded, **reasons})
    return rewrite


def _folded(rewrite: Rewrite, group: Group) -> Rewrite | str:
    """The rewrite with the group's shifts folded, or why they are not."""
    shift = _shift_of(rewrite, group.sites)
    if isinstance(shift, str):
        return shift
    producer = find_producer(rewrite.model, rewrite.graph, group, rewrite.qparams)
    return producer if isinstance(producer, str) else _fold(rewrite, group, producer, shift)


def _shift_of(rewrite: Rewrite, sites: Sequence[Site]) -> Tensor | str:
    """The shift that all ``sites`` were decided to, or why there is none."""
    if any(site.name not in rewrite.qparams for site in sites):
        return "a weight in high precision reads the activation too"
    activations = [rewrite.qparams[site.name].activation for site in sites]
    shifts = [None if found is None else found.exponent_shift for found in activations]
    if all(shift is None for shift in shifts):
        return "no shifts"
    first = shifts[0]
    if first is None or any(s is None or not torch.equal(first, s) for s in shifts):
        return "weights that read the activation have different shifts"  # a recipe's overrides
    return first


def _fold(rewrite: Rewrite, group: Group, producer: Producer, shift: Tensor) -> Rewrite | str:
    """The rewrite with the fold, or why a parameter or a scale cannot take it."""
    parameters, row_shifts = dict(rewrite.parameters), dict(rewrite.row_shifts)
    if producer.site is not None:
        rows = _row_shift(producer, shift)
        if rows is None:
            return "channels of one producer's row (heads that share values) have different shifts"
        name = producer.site.name
        # Another group's may be there already, of other rows.
        row_shifts[name] = row_shifts.get(name, 0) + rows
        if not can_shift(rewrite.qparams[name].weight, row_shifts[name]):
            return "block scales of the weight before it would be rounded"
        shift = rows
    for name in producer.parameters:
        old = parameters.get(name, rewrite.model.get_parameter(name).detach())
        moved = _times_power(old, shift, producer.added)
        if moved is None:
            return "a parameter before it would be rounded"
        parameters[name] = moved
    sites = tuple(site.name for site in group.sites)
    key = producer.site.name if producer.site is not None else producer.parameters[0]
    return replace(
        rewrite,
        parameters=parameters,
        row_shifts=row_shifts,
        qparams={**rewrite.qparams, **{name: _taken_up(rewrite, name) for name in sites}},
        folded={**rewrite.folded, key: (*rewrite.folded.get(key, ()), *sites)},
    )


def _taken_up(rewrite: Rewrite, name: str) -> SiteQParams:
    decision = rewrite.qparams[name]
    assert decision.activation is not None
    return replace(decision, activation=replace(decision.activation, shift_folded=True))


def _times_power(old: Tensor, shift: Tensor, added: float) -> Tensor | None:
    """``new`` such that ``added + new`` is ``(added + old) * 2^-shift`` exactly; None if the dtype
    has none. With ``added`` float32 stands for a narrower dtype: the graph computes in it.
    """
    if not added:
        factor = power_of_two(-shift).to(old.dtype)
        return old * factor if torch.equal(old * factor / factor, old) else None
    wanted = (added + old.float()) * power_of_two(-shift)
    new = wanted - added
    return new if torch.equal(added + new, wanted) else None


def _row_shift(producer: Producer, shift: Tensor) -> Tensor | None:
    """The shift of every output row of the producer, 0 where nobody asks for one; None if one row
    is asked for two.
    """
    assert producer.site is not None
    assert producer.sources is not None
    rows = torch.zeros(producer.site.linears[0].meta["val"].shape[-1], dtype=shift.dtype)
    rows[producer.sources] = shift
    return rows if torch.equal(rows[producer.sources], shift) else None
