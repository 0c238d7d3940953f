"""Text to calibrate on and to score, from a file, the package or the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from fp4compile.batches import bundled
from fp4compile.errors import CalibrationDataError, MissingDependencyError

BUNDLED = {"calibration": "calibration.txt", "heldout": "heldout.txt"}
# Suffix -> builder of ``datasets`` that reads it; every other file is one text.
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMN = "text"
_CHOICES = (
    f"give a text file, one of {', '.join(BUNDLED)}, or name[:config[:split]] of a data set on the "
    "hub"
)


def read_texts(source: str) -> list[str]:
    """The texts that ``source`` names.

    Args:
        source: ``"calibration"`` or ``"heldout"`` (excerpts of WikiText-2 that come with the
            package); a text file; a .json, .jsonl, .csv or .parquet file; or a data set on the
            Hugging Face hub, ``name[:config[:split]]``. Tables are read in their column "text".

    Raises:
        CalibrationDataError: there is no such file or data set, or it holds no text.
        MissingDependencyError: ``datasets`` is needed and not installed.
    """
    path = Path(source)
    if source in BUNDLED:
        texts = [bundled(BUNDLED[source])]
    elif not path.is_file() and path.suffix in (*TABLES, ".txt"):
        raise CalibrationDataError(f"there is no file {source}; {_CHOICES}")
    elif not path.is_file():
        texts = _column(_hub(source), source)
    elif path.suffix in TABLES:
        load = _datasets().load_dataset
        rows = load(TABLES[path.suffix], data_files=str(path), split="train")
        texts = _column(rows, source)
    else:
        texts = [path.read_text(encoding="utf-8")]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CalibrationDataError(f"{source} holds no text; give a file or data set that does")
    return texts


def text_ids(tokenizer: Any, text: str) -> Tensor:
    """Tokens ``[1, T]`` of a long text, without special ones, to be cut into windows."""
    # Not verbose: it would warn that the text is longer than a model's context.
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    ids: Tensor = encoded.input_ids
    return ids


def _hub(source: str) -> Any:
    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        return _datasets().load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError) as error:  # not found, no network, no such config or split
        raise CalibrationDataError(
            f"{source!r} is neither a file nor a data set that can be loaded: {error}\n{_CHOICES}"
        ) from error


def _column(rows: Any, source: str) -> list[str]:
    if COLUMN not in rows.column_names:
        raise CalibrationDataError(
            f"{source} has the columns {list(rows.column_names)}; its text must be in {COLUMN!r}"
        )
    return [str(text) for text in rows[COLUMN]]


def _datasets() -> Any:
    if find_spec("datasets") is None:
        raise MissingDependencyError(
            "tables and data sets are read by datasets, not installed here; "
            "run: pip install 'fp4compile[eval]'"
        )
    import datasets

    return datasets
