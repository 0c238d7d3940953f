"""What a quantized model of any family must be able to do besides computing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

Batch = dict[str, Tensor]
# Squared error of compiled against eager: sums in another order, which an activation's rounding
# may see.
LARGEST_DIFFERENCE = 1e-3


def relative_error(model: Any, reference: Any, batch: Batch) -> float:
    """Squared difference of the first outputs over the reference's square."""
    with torch.no_grad():
        got, expected = (first_output(each(**batch)) for each in (model, reference))
    return float((got - expected).square().sum() / expected.square().sum())


def first_output(output: Any) -> Tensor:
    """The first tensor that a model returns."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    found: Tensor = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
    return found


def is_one_graph(model: nn.Module, batch: Batch) -> bool:
    """Whether Dynamo and AOTAutograd take the forward as one graph of ``fp4::`` ops, which computes
    what the model does. They raise where they do not.
    """
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    return relative_error(compiled, model, batch) < LARGEST_DIFFERENCE


def reloads(model: Any, unquantized: Any, batch: Batch) -> bool:
    """Whether the model computes the same bits after it was saved and loaded: as a checkpoint of
    transformers where it is such a model itself, else its ``state_dict``, into ``unquantized``.
    """
    from transformers import PreTrainedModel

    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            again: Any = type(model).from_pretrained(folder)
        else:
            path = Path(folder) / "model.pt"
            torch.save(model.state_dict(), path)
            again = unquantized
            state = torch.load(path, weights_only=True)
            for name, module in again.named_modules():
                if parametrize.is_parametrized(module) and f"{name}.weight" in state:
                    parametrize.remove_parametrizations(module, "weight")
            again.load_state_dict(state, assign=True)
    return relative_error(again, model, batch) == 0
