"""GPU code without a GPU: :func:`compile_for` compiles it, :func:`interpret` runs it."""

from fp4compile.lowering.testing.generate import Generated, compile_for
from fp4compile.lowering.testing.interpret import interpret, interpret_with_sources
from fp4compile.lowering.testing.machine_code import MachineCode

__all__ = ["Generated", "MachineCode", "compile_for", "interpret", "interpret_with_sources"]
