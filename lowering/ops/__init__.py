"""Importing this package registers the lowerings of all fp4:: ops."""

from fp4compile.lowering.ops import (
    attend,
    embedding,
    grouped_linear,
    linear,
    linears,
    quantize_activation,
)

__all__ = ["attend", "embedding", "grouped_linear", "linear", "linears", "quantize_activation"]
