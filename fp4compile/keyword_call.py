"""Forwards that take ``**kwargs``, as peft's does, called by a signature that names them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

# What a wrapper puts before the names of parameters.
_INNER = "_fp4compile_inner"


class _NamingKeywords(nn.Module):
    """Calls a model whose forward takes ``**kwargs`` by a signature that names them: torch.export
    mistakes the others for one argument.
    """

    def __init__(self, model: nn.Module, signature: inspect.Signature) -> None:
        super().__init__()
        self.add_module(_INNER, model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        vars(forward)["__signature__"] = signature
        self.forward = forward
        self.training = model.training


def naming_keywords(model: nn.Module, kwargs: Mapping[str, Any]) -> nn.Module:
    """``model``, or a call of it that names ``kwargs`` which its forward does not name."""
    signature = inspect.signature(model.forward)
    unnamed = [name for name in kwargs if name not in signature.parameters]
    if not unnamed:
        return model
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in unnamed]
    return _NamingKeywords(model, signature.replace(parameters=[*named, *added]))


def parameter_name(node: fx.Node) -> str:
    """The name in the model of what a get_attr node reads."""
    return str(node.target).removeprefix(f"{_INNER}.")
