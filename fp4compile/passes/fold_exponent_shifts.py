"""Move 2^-exponent_shift from the activation into what produces it, where that is exact.

A power of two commutes with every rounding, so the producer may yield ``x * 2^-shift`` itself:
a norm through its gamma (and beta), also where the graph adds 1 to it, or a linear through its
output rows. Between producer and activation may stand multiplications by something else
(``silu(gate) * up`` before ``down``), views and splits of a fused projection, and attention, whose
outputs have the channels of its values.
LLM-FP4, section 3.3: "re-parameterised as the exponential bias of the weights".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fp4compile.numerics import power_of_two
from fp4compile.passes.channel_paths import channel_sources, next_on_path
from fp4compile.passes.plan import Rewrite, can_shift
from fp4compile.trace import PASS_THROUGH, Group, Site, bias_node, parameter_name

aten = torch.ops.aten

# op -> positions of the per-channel parameters (gamma, beta) that scale its output
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}


@dataclass(frozen=True)
class _Producer:
    """Per-channel parameters of a norm, to which the graph adds ``added``; or the site whose output
    it is and the channels ``sources`` of it that the activation has.
    """

    parameters: tuple[str, ...] = ()
    added: float = 0.0
    site: Site | None = None
    sources: Tensor | None = None


def fold_exponent_shifts(rewrite: Rewrite) -> Rewrite:
    """Fold the shifts of every group whose producer can take them exactly."""
    for group in rewrite.graph.groups:
        decided = [site for site in group.sites if site.name in rewrite.qparams]
        shift = _shift_of(rewrite, group.sites)
        if shift is None or len(decided) < len(group.sites) or group.patch:
            continue
        producer = _find_producer(rewrite, group)
        if producer is not None:
            rewrite = _fold(rewrite, group, producer, shift) or rewrite
    return rewrite


def _shift_of(rewrite: Rewrite, sites: Sequence[Site]) -> Tensor | None:
    found = rewrite.qparams.get(sites[0].name)
    activation = found.activation if found is not None else None
    return None if activation is None else activation.exponent_shift


def _fold(rewrite: Rewrite, group: Group, producer: _Producer, shift: Tensor) -> Rewrite | None:
    """The rewrite with the fold, or None where a parameter's dtype or a block scale would round, or
    where channels that come from one row have different shifts.
    """
    parameters, row_shifts = dict(rewrite.parameters), dict(rewrite.row_shifts)
    names = producer.parameters
    if producer.site is not None:
        bias = _bias_of(rewrite, producer.site)
        names = (bias,) if bias else ()
        rows = _row_shift(rewrite, producer, shift)
        if rows is None or not can_shift(rewrite.qparams[producer.site.name].weight, rows):
            return None
        row_shifts[producer.site.name] = shift = rows
    for name in names:
        moved = _times_power(rewrite.model.get_parameter(name).detach(), shift, producer.added)
        if moved is None:
            return None
        parameters[name] = moved
    qparams = dict(rewrite.qparams)
    for site in group.sites:
        decision = qparams[site.name]
        assert decision.activation is not None
        folded = replace(decision.activation, shift_folded=True)
        qparams[site.name] = replace(decision, activation=folded)
    key = producer.site.name if producer.site is not None else names[0]
    folds = {**rewrite.folded, key: tuple(site.name for site in group.sites)}
    return replace(
        rewrite, parameters=parameters, row_shifts=row_shifts, qparams=qparams, folded=folds
    )


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


def _row_shift(rewrite: Rewrite, producer: _Producer, shift: Tensor) -> Tensor | None:
    """The shift of every output row of the producer; 0 where nobody asks for one."""
    assert producer.site is not None
    assert producer.sources is not None
    if producer.site.name in rewrite.row_shifts:
        return None
    rows = torch.zeros(producer.site.linears[0].meta["val"].shape[-1], dtype=shift.dtype)
    rows[producer.sources] = shift
    return rows if torch.equal(rows[producer.sources], shift) else None


def _find_producer(rewrite: Rewrite, group: Group) -> _Producer | None:
    """Walk up from the group's input, which must have no other reader."""
    readers = {node for site in group.sites for node in site.linears}
    if set(group.input.users) != readers:
        return None
    return _walk(rewrite, (group.input,))


def _walk(rewrite: Rewrite, path: tuple[fx.Node, ...]) -> _Producer | None:
    """The producer at the start of ``path``, or one further up."""
    node = path[0]
    site = next((site for site in rewrite.graph.sites if site.linears == (node,)), None)
    if site is not None:
        return _site_producer(rewrite, site, path)
    if node.target in _NORMS or node.target is aten.mul.Tensor:
        found = _norm_producer(rewrite, node)
        if found is not None:
            return found if _is_elementwise(path) else None
    for before in next_on_path(node):
        found = _walk(rewrite, (before, *path))
        if found is not None:
            return found
    return None


def _site_producer(rewrite: Rewrite, site: Site, path: tuple[fx.Node, ...]) -> _Producer | None:
    bias = bias_node(*site.linears)
    own_bias = bias is None or _own_vector(rewrite, bias) is not None
    if site.lookups or site.patch or site.name not in rewrite.qparams or not own_bias:
        return None
    sources = channel_sources(path)
    return None if sources is None else _Producer(site=site, sources=sources)


def _is_elementwise(path: tuple[fx.Node, ...]) -> bool:
    """Whether nobody else reads the path and channels stay where they are."""
    sources = channel_sources(path)
    return sources is not None and torch.equal(sources, torch.arange(len(sources)))


def _norm_producer(rewrite: Rewrite, node: fx.Node) -> _Producer | None:
    """The parameters of a norm, or a vector that ``node`` multiplies with."""
    if node.target in _NORMS:
        positions = [p for p in _NORMS[node.target] if p < len(node.args)]
        arguments = [node.args[p] for p in positions if node.args[p] is not None]
        names = [_own_vector(rewrite, argument) for argument in arguments]
        found = tuple(name for name in names if name)
        return _Producer(found) if names and len(found) == len(names) else None
    for factor in node.args:
        name, added = _own_vector(rewrite, factor), 0.0
        if name is None:
            name, added = _one_plus_vector(rewrite, factor)
        if name is not None:
            return _Producer((name,), added)
    return None


def _one_plus_vector(rewrite: Rewrite, node: object) -> tuple[str | None, float]:
    """(name, number added) of a vector as Gemma's norms use it: ``1 + weight.float()``."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or len(node.users) != 1:
        return None, 0.0
    numbers = [value for value in node.args if isinstance(value, int | float)]
    vectors = [value for value in node.args if isinstance(value, fx.Node)]
    if len(numbers) != 1 or len(vectors) != 1 or node.meta["val"].dtype != torch.float32:
        return None, 0.0
    vector = vectors[0]
    if vector.target in PASS_THROUGH and len(vector.users) == 1:
        vector = vector.args[0]
    return _own_vector(rewrite, vector), float(numbers[0])


def _own_vector(rewrite: Rewrite, node: object) -> str | None:
    """Name of the 1-D parameter that ``node`` reads, if nothing else reads it."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) != 1:
        return None
    named = dict(rewrite.model.named_parameters(remove_duplicate=False))
    name = parameter_name(node)
    parameter = named.get(name)
    if parameter is None or parameter.dim() != 1:
        return None
    shared = sum(other is parameter for other in named.values()) > 1
    return None if shared or name in rewrite.parameters else name


def _bias_of(rewrite: Rewrite, site: Site) -> str | None:
    return _own_vector(rewrite, bias_node(*site.linears))
