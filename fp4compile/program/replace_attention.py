"""Attention goes through ``fp4::attend``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import fp4compile.ops  # noqa: F401  (defines fp4::attend)
from fp4compile.program.capture import BLOCK, Capture

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def replace_attention(capture: Capture) -> None:
    """Rewrite ``capture.graph`` where it is attention in one call without dropout."""
    for node in capture.graph.find_nodes(op="call_function", target=_FLASH):
        results = list(node.users)
        if not _fits(node) or any(_position(user) != 0 for user in results if user.users):
            continue
        query, key, value, _, causal = _arguments(node)
        options = {
            "causal": causal,
            "rows_first": not node.meta["val"][0].is_contiguous(),
        }
        scale = node.kwargs.get("scale") or query.meta["val"].shape[-1] ** -0.5
        mask = node.kwargs.get("attn_mask")
        for user in results:
            if not user.users:
                capture.graph.erase_node(user)
                continue
            with capture.graph.inserting_before(user):
                new = capture.graph.call_function(
                    torch.ops.fp4.attend.default, (query, key, value, mask, scale), options
                )
            new.meta = {BLOCK: node.meta[BLOCK], "val": user.meta["val"]}
            user.replace_all_uses_with(new)
            capture.graph.erase_node(user)
        capture.graph.erase_node(node)


def _position(user: fx.Node) -> Any:
    return user.args[1] if user.target is operator.getitem else None


def _arguments(node: fx.Node) -> list[Any]:
    """Query, key, value, dropout and whether it is causal."""
    return [*node.args, *(0.0, False)[len(node.args) - 3 :]]


def _fits(node: fx.Node) -> bool:
    *operands, dropout, causal = _arguments(node)
    query, key, value = (operand.meta["val"] for operand in operands)
    mask = node.kwargs.get("attn_mask")
    result = node.meta["val"][0]
    return (
        (mask is None or mask.meta["val"].dim() == 4)  # type: ignore[union-attr]
        and isinstance(query.shape[3], int)
        and query.shape[3] == value.shape[3]
        and query.shape[1] == key.shape[1]
        and not dropout
        and (result.is_contiguous() or result.transpose(1, 2).is_contiguous())
        and not (causal and mask is not None)
    )
