"""Every error a user can cause, one class per mistake.

Messages say what was given, what is needed and what to do. All derive from
:class:`Fp4CompileError`, so ``except fp4compile.Fp4CompileError`` catches them and nothing else.
"""

from __future__ import annotations


class Fp4CompileError(Exception):
    """Base of all errors that fp4compile raises on purpose."""


class UnknownFormatError(Fp4CompileError):
    """A floating-point format was named that the table in ``formats.py`` does not hold."""


class SpecError(Fp4CompileError):
    """The requested bits, granularity or method do not exist or do not go together."""


class CalibrationDataError(Fp4CompileError):
    """The calibration data are empty, of an unknown kind, or do not fit the model's forward."""


class NonFiniteError(Fp4CompileError):
    """NaN or infinity was met in a weight or during calibration."""


class MemoryLimitError(Fp4CompileError):
    """``max_memory`` cannot be read, or is too little for this model."""


class CheckpointError(Fp4CompileError):
    """``calibration_dir`` or a saved model belongs to another run, or cannot be read."""


class TraceError(Fp4CompileError):
    """The model could not be exported, so its quantizable sites are unknown."""


class SelectionError(Fp4CompileError):
    """``targets``, ``ignore`` or a recipe name sites that the model does not have."""


class AlreadyQuantizedError(Fp4CompileError):
    """The model already holds FP4 weights."""


class RecipeError(Fp4CompileError):
    """A recipe cannot be read, or does not belong to this model."""


class UnsupportedOperationError(Fp4CompileError):
    """An operation was called on a quantized weight that has no quantized meaning."""


class CompileError(Fp4CompileError):
    """The compiled model breaks the coverage contract, or Inductor cannot be used here."""


class ShardingError(Fp4CompileError):
    """A quantized weight cannot be divided among processes as the plan asks."""


class InterchangeError(Fp4CompileError):
    """Another library's format cannot express what the model holds."""


class EvaluationError(Fp4CompileError):
    """A measurement was asked for that has nothing to measure."""


class ReportError(Fp4CompileError):
    """A report cannot be made of what was given, or not be written where it should."""


class ModelError(Fp4CompileError):
    """A model that was named cannot be loaded, or cannot do what was asked of it."""


class MissingDependencyError(Fp4CompileError):
    """An optional package is needed for this call and is not installed."""
