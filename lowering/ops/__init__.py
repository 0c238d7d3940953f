"""Importing this package registers the lowerings of all fp4:: ops."""

from fp4compile.lowering.ops import embedding, grouped_linear, linear, quantize_activation

__all__ = ["embedding", "grouped_linear", "linear", "quantize_activation"]
