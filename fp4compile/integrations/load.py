"""``fp4compile.from_pretrained``: FP4 checkpoints of any program, by transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fp4compile.errors import MissingDependencyError


def from_pretrained(name: str | Path, auto_class: Any = None, **options: Any) -> Any:
    """Load an FP4 checkpoint as a Hugging Face model with FP4 weights, without unpacking it.

    Read are those of fp4compile itself, of compressed-tensors (``nvfp4-pack-quantized``, with
    activations too, and ``mxfp4-pack-quantized``), gpt-oss style MXFP4, and bitsandbytes' FP4.
    Codes and block scales are taken bit for bit. NVFP4's global scale is a divisor and ours a
    factor, so its weights may differ by one float32 rounding; MXFP4 is exact. A weight of
    bitsandbytes that no FP4 weight equals stays in high precision, named in a warning.

    Args:
        name: a directory, or a name on the Hugging Face hub.
        auto_class: ``AutoModelForCausalLM`` unless given, or another Auto or model class.
        options: those of ``auto_class.from_pretrained``.

    Returns:
        The model, in eval mode; ``save_pretrained`` writes it as fp4compile's own checkpoint, and
        ``compile_model`` compiles it.

    Raises:
        InterchangeError: the checkpoint is in full precision or in another format, its scales do
            not fit E4M3, none of its weights is exact, or it belongs to another model.
        MissingDependencyError: transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            "from_pretrained needs transformers: pip install 'fp4compile[hf]'"
        ) from error
    loader = importlib.import_module("fp4compile.integrations.hf_import")
    return loader.load(str(name), auto_class or transformers.AutoModelForCausalLM, **options)
