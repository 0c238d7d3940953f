"""C++ with the vectors of GCC's and Clang's language extension: any problem, any CPU."""

from __future__ import annotations

from fp4compile.lowering.targets.template import CppTarget

TARGET = CppTarget(
    name="cpp_portable",
    templates=lambda problem: ("portable",),
    declines=lambda problem: None,
)
