"""Plain C++ that any compiler vectorises as it can: the last resort before the eager op."""

from __future__ import annotations

from fp4compile.lowering.targets.template import CppTarget

TARGET = CppTarget(
    name="cpp_portable",
    templates=lambda problem: ("portable",),
    declines=lambda problem: None,
)
