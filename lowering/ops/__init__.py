"""Importing this package registers the lowerings of all fp4:: ops."""

from fp4compile.lowering.ops import embedding, linear, quantize_activation

__all__ = ["embedding", "linear", "quantize_activation"]
