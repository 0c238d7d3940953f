"""From what a user names to a model and its tokenizer, and back to a directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fp4compile.commands.output import working
from fp4compile.demo_model import import_noise_dropped, load_demo_model
from fp4compile.errors import MissingDependencyError, ModelError, ReportError
from fp4compile.page import Page, page_of
from fp4compile.tensor import FP4Tensor

DEMO = "demo"
REPORT_FILE = "fp4_report.json"
STATE_FILE = "fp4_state.pt"
# No name on the hub starts so.
PATH_STARTS = (".", "/", "~")
_CHOICES = (
    f"give a directory with config.json and weights, a name on the Hugging Face hub, or {DEMO!r}"
)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer; ``no_tokenizer`` says why there is none."""

    model: Any
    tokenizer: Any
    no_tokenizer: str = ""

    @property
    def is_quantized(self) -> bool:
        return any(isinstance(parameter, FP4Tensor) for parameter in self.model.parameters())

    def needed_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ModelError: there is none.
        """
        if self.tokenizer is None:
            raise ModelError(
                f"this command reads text, and the model has no tokenizer ({self.no_tokenizer}); "
                "give a language model's directory that holds its tokenizer's files"
            )
        return self.tokenizer


def saved_report(folder: Path) -> Page | None:
    """What :func:`save` kept of the report in ``folder``; None where it wrote nothing."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        return Page.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ReportError(f"{path} cannot be read: {error}; quantize the model again") from error


def load(name: str, dtype: torch.dtype | None) -> Loaded:
    """The model that MODEL names, in ``dtype``; None keeps the dtype that it is stored in.

    Raises:
        ModelError: it cannot be loaded; the message carries the reason.
        MissingDependencyError: transformers, or what the demo model needs, is not installed.
    """
    if find_spec("transformers") is None:
        raise MissingDependencyError(
            "models are loaded by transformers, not installed here; "
            "run: pip install 'fp4compile[hf]'"
        )
    with working(f"loading {name}"):
        if name == DEMO:
            return Loaded(*load_demo_model(None, dtype or torch.bfloat16))
        with import_noise_dropped():
            return _load_pretrained(name, dtype or "auto")


def _load_pretrained(name: str, dtype: torch.dtype | str) -> Loaded:
    import transformers

    if name.startswith(PATH_STARTS) and not Path(name).is_dir():
        raise ModelError(f"there is no directory {name}; {_CHOICES}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        # The class that was saved: an Auto class would have to know the task.
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        state = Path(name) / STATE_FILE
        if state.is_file():
            model = _from_state(kind(config), state)
        else:
            model = kind.from_pretrained(name, dtype=dtype).eval()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot load {name!r}: {error}\n{_CHOICES}") from error
    return Loaded(model, *_tokenizer(name))


def _tokenizer(name: str) -> tuple[Any, str]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name), ""
    except (OSError, ValueError, KeyError) as error:  # what it raises where there is none
        return None, str(error).strip().splitlines()[0]


def save(loaded: Loaded, folder: Path) -> None:
    """Write the quantized model, its tokenizer and what its report says; ``load`` reads it back."""
    with working(f"saving to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if hasattr(loaded.model, "hf_quantizer"):
            loaded.model.save_pretrained(folder)
        else:
            loaded.model.config.save_pretrained(folder)
            torch.save(loaded.model.state_dict(), folder / STATE_FILE)
        page = page_of(loaded.model.fp4_report)
        (folder / REPORT_FILE).write_text(json.dumps(page.to_dict()), encoding="utf-8")
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(folder)


def _from_state(model: Any, state: Path) -> Any:
    model.load_state_dict(torch.load(state, weights_only=True), assign=True)
    model.tie_weights()
    return model.eval()
