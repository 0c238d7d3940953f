"""A recipe: the decisions of a run as readable JSON, to repeat it without calibrating."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4compile.errors import RecipeError
from fp4compile.qparams import ActivationQParams, SiteQParams, WeightQParams
from fp4compile.trace import Graph

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Decision per site name. Floats survive the JSON bit for bit (float32 fits a double)."""

    sites: Mapping[str, SiteQParams]

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        sites = {name: _site_to_json(site) for name, site in self.sites.items()}
        Path(path).write_text(json.dumps({"version": VERSION, "sites": sites}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: there is no such file, or it is not a recipe of this version.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["version"] != VERSION:
                raise RecipeError(
                    f"{path} is a recipe of version {content['version']}, this fp4compile reads "
                    f"version {VERSION}; make it again"
                )
            return cls({name: _site_from_json(site) for name, site in content["sites"].items()})
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path} is not a recipe: {type(error).__name__} {error}") from error

    def decisions(self, graph: Graph) -> dict[str, SiteQParams]:
        """The decisions for the sites of ``graph``.

        Raises:
            RecipeError: the recipe names a site that the model does not have.
        """
        known = {site.name for site in graph.sites} | set(graph.skipped)
        unknown = sorted(set(self.sites) - known)
        if unknown:
            raise RecipeError(
                f"the recipe has {len(unknown)} sites that the model does not have, the first is "
                f"{unknown[0]}; it belongs to another model"
            )
        return {site.name: self.sites[site.name] for site in graph.sites if site.name in self.sites}


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """The recipe, read from its path if need be."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _site_to_json(site: SiteQParams) -> dict[str, Any]:
    activation = site.activation
    return {
        "weight": {"format": site.weight.format, "scale": site.weight.scale.tolist()},
        "activation": activation
        and {
            "format": activation.format,
            "granularity": activation.granularity,
            "scale": activation.scale.item(),
            "exponent_shift": _to_list(activation.exponent_shift),
        },
        "error": site.error,
        "minmax_error": site.minmax_error,
    }


def _site_from_json(content: Mapping[str, Any]) -> SiteQParams:
    weight, activation = content["weight"], content["activation"]
    return SiteQParams(
        WeightQParams(weight["format"], torch.tensor(weight["scale"])),
        activation
        and ActivationQParams(
            activation["format"],
            activation["granularity"],
            torch.tensor(activation["scale"]),
            _to_shift(activation["exponent_shift"]),
        ),
        content["error"],
        content["minmax_error"],
    )


def _to_list(shift: Tensor | None) -> list[int] | None:
    return None if shift is None else shift.tolist()


def _to_shift(shift: list[int] | None) -> Tensor | None:
    return None if shift is None else torch.tensor(shift, dtype=torch.int8)
