"""Lowerings of the fp4:: ops: the only place that knows Inductor, Triton and C++.

Importing this package registers them with Inductor.
"""

import fp4compile.ops  # noqa: F401  (defines the ops that are lowered)
from fp4compile.lowering import inductor
from fp4compile.lowering.config import config

inductor.check_torch_version()
inductor.install_source_hash(lambda: repr(config))

# After the version guard.
from fp4compile.lowering import ops  # noqa: E402, F401
from fp4compile.lowering.ops.linear import kernel_for  # noqa: E402

compile_graph = inductor.compile_graph

__all__ = ["compile_graph", "config", "kernel_for"]
