"""Lowerings of the fp4:: ops: the only place that knows Inductor, Triton and C++.

Importing this package registers them with Inductor.
"""

from functools import partial

import fp4compile.ops  # noqa: F401  (defines the ops that are lowered)
from fp4compile.lowering import inductor, package
from fp4compile.lowering.code import calls_in
from fp4compile.lowering.config import config

inductor.check_torch_version()
inductor.install_source_hash(config.__repr__)
saved_code = inductor.saved_code
compile_region = inductor.compile_region
compile_graph = partial(inductor.compile_graph, settings=config.__repr__)

# After the version guard.
from fp4compile.lowering import ops  # noqa: E402, F401
from fp4compile.lowering.inductor_gpu import architecture  # noqa: E402
from fp4compile.lowering.ops.linear import kernel_for  # noqa: E402
from fp4compile.lowering.replay import Recording  # noqa: E402
from fp4compile.lowering.serves import services  # noqa: E402
from fp4compile.lowering.targets.triton_scaled import multiplies_fp4  # noqa: E402

__all__ = [
    "Recording",
    "architecture",
    "calls_in",
    "compile_graph",
    "compile_region",
    "config",
    "inductor",
    "kernel_for",
    "multiplies_fp4",
    "package",
    "saved_code",
    "services",
]
