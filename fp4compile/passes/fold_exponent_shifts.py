"""Move 2^-exponent_shift from the activation into what produces it, where that is exact.

A power of two commutes with every rounding, so the producer may yield ``x * 2^-shift`` itself:
a norm through its gamma (and beta), a linear through its output rows, also when only a
multiplication by something else stands between (``silu(gate) * up`` before ``down``).
LLM-FP4, section 3.3: "re-parameterised as the exponential bias of the weights".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fp4compile.numerics import power_of_two
from fp4compile.passes.plan import Rewrite, can_shift
from fp4compile.trace import PASS_THROUGH, Group, Site, bias_node, parameter_name

aten = torch.ops.aten

# op -> positions of the per-channel parameters (gamma, beta) that scale its output
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}


@dataclass(frozen=True)
class _Producer:
    """Either per-channel parameters of a norm, or the site whose output it is."""

    parameters: tuple[str, ...] = ()
    site: Site | None = None


def fold_exponent_shifts(rewrite: Rewrite) -> Rewrite:
    """Fold the shifts of every group whose producer can take them exactly."""
    for group in rewrite.graph.groups:
        decided = [site for site in group.sites if site.name in rewrite.qparams]
        shift = _shift_of(rewrite, group.sites)
        if shift is None or len(decided) < len(group.sites):
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
    """The rewrite with the fold, or None where a parameter's dtype or a block scale would round."""
    parameters, row_shifts = dict(rewrite.parameters), dict(rewrite.row_shifts)
    names = producer.parameters
    if producer.site is not None:
        bias = _bias_of(rewrite, producer.site)
        names = (bias,) if bias else ()
        if not can_shift(rewrite.qparams[producer.site.name].weight, shift):
            return None
        row_shifts[producer.site.name] = shift
    for name in names:
        old = rewrite.model.get_parameter(name).detach()
        factor = power_of_two(-shift).to(old.dtype)
        if not torch.equal(old * factor / factor, old):
            return None
        parameters[name] = old * factor
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


def _find_producer(rewrite: Rewrite, group: Group) -> _Producer | None:
    """Walk up from the group's input; every value on the way may have no other reader."""
    readers = {node for site in group.sites for node in site.linears}
    node = group.input
    if set(node.users) != readers:
        return None
    return _walk(rewrite, node)


def _walk(rewrite: Rewrite, node: fx.Node) -> _Producer | None:
    if _hands_on(node):
        return _walk_only_user(rewrite, node.args[0])
    if node.target is aten.mul.Tensor:
        return _walk_product(rewrite, node)
    if node.target in _NORMS:
        positions = [p for p in _NORMS[node.target] if p < len(node.args)]
        arguments = [node.args[p] for p in positions if node.args[p] is not None]
        names = [_own_vector(rewrite, argument) for argument in arguments]
        if names and all(names):
            return _Producer(parameters=tuple(name for name in names if name))
    for site in rewrite.graph.sites:
        if site.linears == (node,) and not site.lookups and site.name in rewrite.qparams:
            return _Producer(site=site) if _bias_is_own(rewrite, site) else None
    return None


def _walk_product(rewrite: Rewrite, node: fx.Node) -> _Producer | None:
    for factor in node.args:
        name = _own_vector(rewrite, factor)
        if name is not None:
            return _Producer(parameters=(name,))
    for factor in reversed(node.args):
        found = _walk_only_user(rewrite, factor)
        # A norm below a product with another tensor is as exact as the product with a linear.
        if found is not None:
            return found
    return None


def _walk_only_user(rewrite: Rewrite, node: object) -> _Producer | None:
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    return _walk(rewrite, node)


def _hands_on(node: fx.Node) -> bool:
    """Dtype changes keep powers of two; slices of other dimensions keep the channels."""
    if node.target is aten.slice.Tensor:
        value = node.meta["val"]
        dim = node.args[1] if len(node.args) > 1 else 0
        return isinstance(dim, int) and dim % value.dim() != value.dim() - 1
    return node.target in PASS_THROUGH


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


def _bias_is_own(rewrite: Rewrite, site: Site) -> bool:
    return bias_node(*site.linears) is None or _bias_of(rewrite, site) is not None
