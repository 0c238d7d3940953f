"""The ``fp4::`` operators: schema, fake kernel and eager reference, one file each."""

from fp4compile.ops.attend import attend
from fp4compile.ops.embedding import embedding
from fp4compile.ops.grouped_linear import grouped_linear
from fp4compile.ops.linear import linear
from fp4compile.ops.linears import linears
from fp4compile.ops.quantize_activation import quantize_activation

__all__ = ["attend", "embedding", "grouped_linear", "linear", "linears", "quantize_activation"]
