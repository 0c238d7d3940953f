"""A recipe: the decisions of a run as readable JSON, to repeat it without calibrating.

Codes of compensated rounding and block scales, a byte or less per weight, lie beside it in
``<name>.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp4compile.errors import RecipeError
from fp4compile.qparams import ActivationQParams, Diagnosis, SiteQParams, WeightQParams
from fp4compile.trace import Graph

VERSION = 2
# Parts of a weight's qparams that are too large for JSON.
CODES = ("packed", "block_scale")


@dataclass(frozen=True)
class Recipe:
    """Decision per site name, and why other parameters were ``skipped``. Floats survive the JSON
    bit for bit (float32 fits a double), but for diagnoses. ``report`` is what the run's report
    said (``Report.to_dict``), for ``fp4compile report``; nothing is decided by it.
    """

    sites: Mapping[str, SiteQParams]
    skipped: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON, and its codes beside it."""
        sites = {name: _site_to_json(site) for name, site in self.sites.items()}
        codes = {
            f"{name}.{part}": tensor.contiguous()
            for name, site in self.sites.items()
            for part in CODES
            if (tensor := getattr(site.weight, part)) is not None
        }
        if codes:
            save_file(codes, _codes_path(path))
        content = {
            "version": VERSION,
            "codes": bool(codes),
            "skipped": dict(self.skipped),
            "report": dict(self.report),
            "sites": sites,
        }
        Path(path).write_text(json.dumps(content, indent=1))

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
            codes = load_file(_codes_path(path)) if content["codes"] else {}
            sites = {
                name: _site_from_json(site, {part: codes.get(f"{name}.{part}") for part in CODES})
                for name, site in content["sites"].items()
            }
            return cls(sites, content["skipped"], content.get("report", {}))
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
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
        return {
            site.name: unfolded(self.sites[site.name])
            for site in graph.sites
            if site.name in self.sites
        }


def unfolded(site: SiteQParams) -> SiteQParams:
    """Which shifts a producer absorbs is decided by the passes, for every model anew."""
    if site.activation is None:
        return site
    return replace(site, activation=replace(site.activation, shift_folded=False))


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """The recipe, read from its path if need be."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _codes_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".safetensors")


def _site_to_json(site: SiteQParams) -> dict[str, Any]:
    activation, weight = site.activation, site.weight
    return {
        "weight": {
            "format": weight.format,
            "scale": weight.scale.tolist(),
            "block_size": weight.block_size,
            "rounding": "nearest" if weight.packed is None else "compensated",
        },
        "activation": activation
        and {name: _plain(value) for name, value in vars(activation).items()},
        "error": site.error,
        "minmax_error": site.minmax_error,
        "unreached": list(site.unreached),
        "diagnosis": site.diagnosis and _diagnosis_to_json(site.diagnosis),
    }


def _diagnosis_to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    # Only drawn, so a few digits do.
    absmax = [float(f"{value:.4g}") for value in diagnosis.channel_absmax.tolist()]
    return {**vars(diagnosis), "channel_absmax": absmax}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _site_from_json(content: Mapping[str, Any], codes: Mapping[str, Tensor | None]) -> SiteQParams:
    weight, activation = content["weight"], content["activation"]
    if (weight["rounding"] == "compensated") != (codes["packed"] is not None):
        raise KeyError("the codes of a weight are missing in the .safetensors file")
    scale = torch.tensor(weight["scale"])
    return SiteQParams(
        WeightQParams(weight["format"], scale, block_size=weight["block_size"], **codes),
        activation and _activation_from_json(activation),
        content["error"],
        content["minmax_error"],
        tuple(content.get("unreached", ())),
        _diagnosis_from_json(content.get("diagnosis")),
    )


def _diagnosis_from_json(content: Mapping[str, Any] | None) -> Diagnosis | None:
    if content is None:
        return None  # of a weight that is only looked up, or of an older version
    return Diagnosis(**{**content, "channel_absmax": torch.tensor(content["channel_absmax"])})


def _activation_from_json(content: Mapping[str, Any]) -> ActivationQParams:
    shift = content["exponent_shift"]
    tensors = {
        "scale": torch.tensor(content["scale"]),
        "exponent_shift": None if shift is None else torch.tensor(shift, dtype=torch.int8),
    }
    return ActivationQParams(**{**content, **tensors})
