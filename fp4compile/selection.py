"""Which sites to quantize, and how: ``targets=``, ``ignore=`` and ``overrides=``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from fp4compile.errors import SelectionError
from fp4compile.qparams import QuantSpec
from fp4compile.trace import Graph, Site

# A glob on the name, a regular expression after "re:", a module class, or a predicate.
Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]


def select(
    graph: Graph,
    model: nn.Module,
    targets: Sequence[Selector] | None,
    ignore: Sequence[Selector] | None,
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The chosen sites, and the reason for every site left out.

    A selector is matched with every name of the site's parameter and of the module that owns it.

    Raises:
        SelectionError: a selector matches no site.
    """
    chosen, left_out = [], {}
    _check_all_match(graph, model, (*(targets or ()), *(ignore or ())))
    for site in graph.sites:
        if targets is not None and not _matches_any(site, model, targets):
            left_out[site.name] = "not in targets"
        elif ignore is not None and _matches_any(site, model, ignore):
            left_out[site.name] = "in ignore"
        else:
            chosen.append(site)
    return tuple(chosen), left_out


def with_overrides(
    graph: Graph, model: nn.Module, overrides: Mapping[Selector, str | QuantSpec]
) -> Graph:
    """``graph`` with the spec of the first selector that matches a site; others have none.

    Raises:
        SelectionError: a selector matches no site.
        SpecError: there is no such preset.
    """
    _check_all_match(graph, model, tuple(overrides))
    specs = {selector: as_spec(spec) for selector, spec in overrides.items()}

    def spec_of(site: Site) -> QuantSpec | None:
        found = (spec for key, spec in specs.items() if _matches_any(site, model, [key]))
        return next(found, None)

    return replace(graph, sites=tuple(replace(site, spec=spec_of(site)) for site in graph.sites))


def as_spec(spec: str | QuantSpec) -> QuantSpec:
    """The spec, or the preset of that name."""
    return QuantSpec.preset(spec) if isinstance(spec, str) else spec


def without_embeddings(
    sites: Sequence[Site], spec: QuantSpec
) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The sites that ``spec``, or an override, quantizes as embeddings or that are none; and the
    reason for the others.
    """
    reason = "the spec keeps embeddings in high precision"
    kept = [site for site in sites if not site.lookups or (site.spec or spec).embedding]
    return tuple(kept), {site.name: reason for site in sites if site not in kept}


def _check_all_match(graph: Graph, model: nn.Module, selectors: Sequence[Selector]) -> None:
    for selector in selectors:
        if not any(_matches_any(site, model, [selector]) for site in graph.sites):
            names = ", ".join(site.name for site in graph.sites[:8])
            raise SelectionError(
                f"{selector!r} matches none of the {len(graph.sites)} sites; the first ones are "
                f"{names}. Use a glob ('*.down_proj'), 're:<regex>', a module class or a predicate"
            )


def _matches_any(site: Site, model: nn.Module, selectors: Sequence[Selector]) -> bool:
    for name in site.aliases:
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        if any(_matches(selector, name, owner, module) for selector in selectors):
            return True
    return False


def _matches(selector: Selector, name: str, owner: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        if selector.startswith("re:"):
            return any(re.search(selector[3:], candidate) for candidate in (name, owner))
        return any(fnmatchcase(candidate, selector) for candidate in (name, owner))
    if isinstance(selector, type):
        return isinstance(module, selector)
    return selector(owner, module)
