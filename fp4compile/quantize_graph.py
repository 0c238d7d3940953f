"""Quantize the weights of a Dynamo graph by a recipe, for the backend's option "recipe".

The model keeps its full-precision parameters; the graph gets its own FP4 weights.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from fp4compile.errors import AlreadyQuantizedError, RecipeError
from fp4compile.passes.swap_weights import fp4_weight
from fp4compile.recipe import Recipe, as_recipe, unfolded
from fp4compile.tensor import FP4Tensor

logger = logging.getLogger(__name__)

# A weight that stands here itself, not transposed, is [K, N].
_MATRIX_PRODUCTS = frozenset(
    {torch.matmul, torch.mm, torch.addmm, operator.matmul, "matmul", "mm", "addmm"}
)
# ["model"] in L['self']._modules['model']._parameters['weight'], the name that Dynamo gives
_ATTRIBUTE = re.compile(r"\._(?:modules|parameters)\['([^']+)'\]")

# parameter -> (recipe, the parameter's version, its FP4 weight): a model has several graphs
_MADE: Any = WeakIdKeyDictionary()


def quantize_graph(
    module: fx.GraphModule, example_inputs: Sequence[Any], recipe: Recipe | str | Path
) -> fx.GraphModule:
    """``module`` with every weight that ``recipe`` names replaced by an FP4 weight.

    Exponent shifts stay at run time: what would absorb them is the model's own parameter. The
    result is bit for bit the one of ``quantize(recipe=...)``, since they are powers of two.

    Raises:
        RecipeError: the graph has weights, and none of them is in the recipe.
        AlreadyQuantizedError: the graph has FP4 weights.
    """
    recipe = _loaded(recipe)
    weights = dict(_weights(module, example_inputs))
    found = {name: node for name, (node, _) in weights.items() if name in recipe.sites}
    if weights and not found:
        raise RecipeError(
            f"the recipe names none of the {len(weights)} weights of this graph, the first is "
            f"{next(iter(weights))}; it belongs to another model"
        )
    absent = sorted(set(recipe.sites) - set(found))
    if found and absent:
        logger.warning(
            "%d weights of the recipe are not in this graph, the first is %s; "
            "compile with fullgraph=True to see why a model is cut into several graphs",
            len(absent),
            absent[0],
        )
    for number, (name, node) in enumerate(found.items()):
        weight = _quantized(weights[name][1], recipe, name, _is_kn(node))
        _replace(module, node, f"fp4_weight_{number}", weight)
    module.recompile()
    return module


def _loaded(recipe: Recipe | str | Path) -> Recipe:
    if isinstance(recipe, Recipe) or not Path(recipe).is_file():
        return as_recipe(recipe)
    return _read(str(recipe), Path(recipe).stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(path: str, _changed: int) -> Recipe:
    return Recipe.load(path)


def _weights(
    module: fx.GraphModule, example_inputs: Sequence[Any]
) -> list[tuple[str, tuple[fx.Node, Tensor]]]:
    """Name, placeholder and value of every parameter of two dimensions."""
    found: list[tuple[str, tuple[fx.Node, Tensor]]] = []
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, example_inputs, strict=True):
        if isinstance(value, torch.nn.Parameter) and value.dim() == 2:
            if isinstance(value, FP4Tensor):
                raise AlreadyQuantizedError(
                    "the model is quantized already; compile it without options['recipe']"
                )
            name = ".".join(_ATTRIBUTE.findall(vars(node)["_dynamo_source"].name))
            found.append((name, (node, value)))
    return found


def _is_kn(weight: fx.Node) -> bool:
    return any(user.target in _MATRIX_PRODUCTS for user in weight.users)


def _quantized(parameter: Tensor, recipe: Recipe, name: str, transposed: bool) -> FP4Tensor:
    made = _MADE.get(parameter)
    if made is not None and made[0] is recipe and made[1] == parameter._version:
        return made[2]
    value = parameter.detach().to(torch.float32)
    weight = fp4_weight(
        value.t().contiguous() if transposed else value,
        unfolded(recipe.sites[name]),
        parameter.dtype,
        transposed=transposed,
    )
    _MADE[parameter] = (recipe, parameter._version, weight)
    return weight


def _replace(module: fx.GraphModule, node: fx.Node, name: str, weight: FP4Tensor) -> None:
    from torch._dynamo.source import AttrSource  # Dynamo runs by now; importing it takes a second

    setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    # AOTAutograd asks for the origin of every parameter.
    origins: dict[str, Any] = vars(module)["_param_name_to_source"]
    origins[name] = AttrSource(vars(node)["_dynamo_source"], "fp4")
    with module.graph.inserting_after(node):
        constant = module.graph.get_attr(name)
    # The placeholder stays: the graph is called with the model's parameters.
    node.replace_all_uses_with(constant)
