"""fp4compile: trained transformers to fast 4-bit floating-point ones, without training."""

from fp4compile.aot_export import export, load_exported
from fp4compile.api import quantize, quantize_and_compile
from fp4compile.channel_order import order_channels
from fp4compile.compile import compile_model, load_lowerings, run_as_programs
from fp4compile.coverage import Coverage, verify
from fp4compile.errors import Fp4CompileError
from fp4compile.integrations import install_hooks
from fp4compile.integrations.compressed_tensors import export_compressed_tensors
from fp4compile.measure import benchmark
from fp4compile.qparams import QuantSpec, TensorSpec
from fp4compile.recipe import Recipe
from fp4compile.report import Report
from fp4compile.search import SearchOptions

__version__ = "0.1.0"
__all__ = [
    "Coverage",
    "Fp4CompileError",
    "QuantSpec",
    "Recipe",
    "Report",
    "SearchOptions",
    "TensorSpec",
    "benchmark",
    "compile_model",
    "export",
    "export_compressed_tensors",
    "load_exported",
    "load_lowerings",
    "order_channels",
    "quantize",
    "quantize_and_compile",
    "run_as_programs",
    "verify",
]

install_hooks()
