"""fp4compile: trained transformers to fast 4-bit floating-point ones, without training."""

from typing import TYPE_CHECKING, Any

from fp4compile.aot_export import export, load_exported
from fp4compile.api import quantize, quantize_and_compile
from fp4compile.channel_order import order_channels
from fp4compile.compile import compile_model, load_lowerings
from fp4compile.coverage import Coverage, verify
from fp4compile.errors import Fp4CompileError
from fp4compile.integrations import install_hooks, lazy_attribute
from fp4compile.integrations.compressed_tensors import export_compressed_tensors
from fp4compile.integrations.load import from_pretrained
from fp4compile.measure import benchmark
from fp4compile.qparams import QuantSpec, TensorSpec
from fp4compile.recipe import Recipe
from fp4compile.report import Report
from fp4compile.search import SearchOptions

if TYPE_CHECKING:
    from fp4compile.integrations.cache import QuantizedCache

__version__ = "0.1.0"
__all__ = [
    "Coverage",
    "FP4Config",
    "FP4Quantizer",
    "Fp4CompileError",
    "QuantSpec",
    "QuantizedCache",
    "Recipe",
    "Report",
    "SearchOptions",
    "TensorSpec",
    "benchmark",
    "compile_model",
    "export",
    "export_compressed_tensors",
    "from_pretrained",
    "load_exported",
    "load_lowerings",
    "order_channels",
    "quantize",
    "quantize_and_compile",
    "verify",
]


def __getattr__(name: str) -> Any:
    # What derives from another library's classes is made when it is asked for.
    return lazy_attribute(name)


install_hooks()
