"""Calibration data in the forms people have, to a list of forward calls."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile.errors import CalibrationDataError

logger = logging.getLogger(__name__)

Batch = tuple[tuple[Any, ...], dict[str, Any]]

DEFAULT_SEQUENCES = 32
DEFAULT_LENGTH = 256
TOKENISED_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
# Arguments of Hugging Face forwards that would make the export carry a cache or labels.
_FORWARD_DEFAULTS = {"use_cache": False}


def as_batches(
    data: Any,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
) -> list[Batch]:
    """``(args, kwargs)`` of the forward calls that calibrate ``model``.

    Args:
        data: an iterable (a DataLoader too) of tensors, tuples or mappings; one mapping
            (BatchEncoding); a ``datasets.Dataset`` with tokenised columns; a list of strings
            with ``tokenizer``; None for the bundled English text, with ``tokenizer``.
        sequences, length: how much text is used, for text and token columns; a bound on the
            number of batches otherwise.

    Raises:
        CalibrationDataError: the data are none of these, empty, or do not fit the forward.
    """
    if data is None:
        data = _bundled_text(tokenizer)
    if isinstance(data, str):
        data = [data]
    if isinstance(data, Tensor):
        data = list(data.split(8)) if data.dim() > 1 else [data[None]]
    if isinstance(data, Mapping):
        data = [data]
    if _is_list_of_strings(data):
        batches = _from_text(data, tokenizer, sequences, length)
    elif hasattr(data, "column_names"):
        batches = _from_columns(data, sequences, length)
    elif isinstance(data, Iterable):
        batches = [_as_call(item) for item in islice(data, sequences)]
    else:
        raise CalibrationDataError(
            f"calib_data is a {type(data).__name__}; give an iterable of tensors, tuples or "
            "dicts, a DataLoader, a datasets.Dataset, or a list of strings with tokenizer="
        )
    if not batches:
        raise CalibrationDataError("calib_data is empty; give at least one batch")
    return [_fit(batch, model) for batch in batches]


def example_call(batch: Batch) -> Batch:
    """The batch with at least two rows, since torch.export specialises a batch of one."""

    def twice(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 1:
            return torch.cat((value, value))
        return value

    args, kwargs = batch
    return tuple(twice(value) for value in args), {k: twice(v) for k, v in kwargs.items()}


def only_example(data: Any, model: nn.Module, tokenizer: Any = None) -> Batch:
    """One call to trace with; a Hugging Face model brings its own (``dummy_inputs``)."""
    if data is None and hasattr(model, "dummy_inputs"):
        data = model.dummy_inputs
    return as_batches(data, model, tokenizer, sequences=2)[0]


def _bundled_text(tokenizer: Any) -> list[str]:
    if tokenizer is None:
        raise CalibrationDataError(
            "calib_data=None uses a bundled English text, which needs tokenizer=; "
            "give calib_data=[...] for a model that does not read text"
        )
    logger.warning(
        "no calib_data given: calibrating on %d x %d tokens of a bundled WikiText-2 excerpt; "
        "a few sequences of your own data give a more accurate model",
        DEFAULT_SEQUENCES,
        DEFAULT_LENGTH,
    )
    return [bundled("calibration.txt")]


def token_mask(batch: Batch) -> Tensor | None:
    """bool ``[B, T]``: which tokens of ``batch`` are no padding; None where it does not say."""
    mask = batch[1].get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def bundled(name: str) -> str:
    """Text of a file in ``fp4compile/data``."""
    return resources.files("fp4compile").joinpath("data", name).read_text(encoding="utf-8")


def _is_list_of_strings(data: Any) -> bool:
    return isinstance(data, Sequence) and bool(data) and all(isinstance(x, str) for x in data)


def _from_text(
    texts: Sequence[str], tokenizer: Callable[..., Any] | None, sequences: int, length: int
) -> list[Batch]:
    """All texts tokenised and cut into equal windows: no padding, so every token counts."""
    if tokenizer is None:
        raise CalibrationDataError("calib_data is text; pass tokenizer= to turn it into tokens")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= sequences * length:
            break
    windows = [ids[i : i + length] for i in range(0, min(len(ids), sequences * length), length)]
    if len(windows) > 1 and len(windows[-1]) < length:
        windows.pop()
    return _token_batches(windows)


def _token_batches(windows: Sequence[Sequence[int]]) -> list[Batch]:
    tokens = torch.tensor(windows)
    return [((), {"input_ids": part}) for part in tokens.split(4)] if tokens.numel() else []


def _from_columns(data: Any, sequences: int, length: int) -> list[Batch]:
    known = [name for name in TOKENISED_COLUMNS if name in data.column_names]
    if not known:
        raise CalibrationDataError(
            f"the dataset has columns {list(data.column_names)}, none of {TOKENISED_COLUMNS}; "
            "tokenise it first (dataset.map(tokenizer)), or pass its texts with tokenizer="
        )
    batches: list[Batch] = []
    for row in islice(data, sequences):
        columns = {name: torch.as_tensor(row[name]) for name in known}
        # Token columns are 1-D and bounded; images are taken whole.
        kwargs = {name: (x[:length] if x.dim() == 1 else x)[None] for name, x in columns.items()}
        batches.append(((), kwargs))
    return batches


def _as_call(item: Any) -> Batch:
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, tuple | list) and item and all(isinstance(x, Tensor) for x in item):
        return tuple(item), {}
    raise CalibrationDataError(
        f"a calibration batch is a {type(item).__name__}; it must be a tensor, a tuple of "
        "tensors, or a dict of the forward's keyword arguments"
    )


def _fit(batch: Batch, model: nn.Module) -> Batch:
    """The call that the forward understands: no labels, no cache, on the model's device."""
    signature = inspect.signature(model.forward)
    args, kwargs = batch
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    kwargs = _with_decoder_inputs(kwargs, model)
    kwargs = {k: v for k, v in kwargs.items() if v is not None and k != "labels"}
    unknown = [name for name in kwargs if name not in signature.parameters and not takes_any]
    if unknown:
        raise CalibrationDataError(
            f"{type(model).__name__}.forward has no argument {unknown}; it takes "
            f"{list(signature.parameters)}"
        )
    # A wrapper (peft) hands on what it does not name.
    inner = getattr(model, "config", None) if takes_any else None
    for name, value in _FORWARD_DEFAULTS.items():
        if name in signature.parameters or hasattr(inner, name):
            kwargs.setdefault(name, value)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CalibrationDataError(
            f"a calibration batch does not fit {type(model).__name__}.forward: {error}"
        ) from error
    device = next(model.parameters()).device
    return (
        tuple(_moved(value, device) for value in args),
        {name: _moved(value, device) for name, value in kwargs.items()},
    )


def _with_decoder_inputs(kwargs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """An encoder-decoder of transformers is calibrated with what its decoder was trained to read:
    the labels, else the input itself, one token later.
    """
    config = getattr(model, "config", None)
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & kwargs.keys()
    labels = kwargs.get("labels")
    is_text = isinstance(labels, Tensor) and labels.dim() == 2
    target = labels if is_text else kwargs.get("input_ids")
    if not getattr(config, "is_encoder_decoder", False) or given or target is None:
        return kwargs
    start = getattr(config, "decoder_start_token_id", None) or 0
    shifted = torch.cat((torch.full_like(target[:, :1], start), target[:, :-1]), dim=1)
    # -100 marks labels that do not count.
    padding = getattr(config, "pad_token_id", None) or 0
    return {**kwargs, "decoder_input_ids": shifted.masked_fill(shifted < 0, padding)}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
