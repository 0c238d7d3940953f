"""Calibration data in every form that people have, and what is said of wrong ones."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from models import tiny_llama, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fp4compile.batches import as_batches, example_call, only_example
from fp4compile.errors import CalibrationDataError


class Tokenizer:
    def __call__(self, text: str, add_special_tokens: bool = True):
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 90 for letter in text]}


LLAMA = tiny_llama()
LINEAR = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("data", "model", "count"),
    [
        ([tokens(), tokens()], LLAMA, 2),
        (tokens(20), LLAMA, 3),
        ([(torch.randn(4, 3),)], LINEAR, 1),
        ([{"input": torch.randn(4, 3)}], LINEAR, 1),
        ({"input_ids": tokens()}, LLAMA, 1),
        (DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4), LINEAR, 2),
        (Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "text": ["a", "b"]}), LLAMA, 2),
        ((torch.randn(2, 3) for _ in range(100)), LINEAR, 32),
    ],
    ids=["tensors", "tensor", "tuples", "dicts", "dict", "loader", "dataset", "generator"],
)
def test_every_form_becomes_calls_that_the_forward_takes(data, model, count):
    batches = as_batches(data, model)
    assert len(batches) == count
    args, kwargs = batches[-1]
    with torch.no_grad():
        model(*args, **kwargs)


def test_text_is_cut_into_equal_windows_without_padding():
    batches = as_batches(["x" * 700, "y" * 700], LLAMA, Tokenizer(), sequences=10, length=128)
    shapes = [kwargs["input_ids"].shape for _, kwargs in batches]
    assert shapes == [(4, 128), (4, 128), (2, 128)]


def test_none_uses_the_bundled_text_and_says_so(caplog):
    batches = as_batches(None, LLAMA, Tokenizer())
    assert sum(kwargs["input_ids"].numel() for _, kwargs in batches) == 32 * 256
    assert "bundled" in caplog.text


def test_huggingface_calls_leave_out_labels_and_the_cache():
    ((_, kwargs),) = as_batches({"input_ids": tokens(), "labels": tokens()}, LLAMA)
    assert set(kwargs) == {"input_ids", "use_cache"}
    assert kwargs["use_cache"] is False


@pytest.mark.parametrize(
    ("data", "model", "says"),
    [
        ([], LINEAR, "empty"),
        (None, LINEAR, "tokenizer="),
        (["text"], LLAMA, "tokenizer="),
        (3, LINEAR, "int"),
        ([3], LINEAR, "int"),
        ([{"inputs": torch.randn(1, 3)}], LINEAR, r"no argument \['inputs'\]"),
        ([(torch.randn(1, 3), torch.randn(1))], LINEAR, "does not fit"),
        (Dataset.from_dict({"text": ["a"]}), LLAMA, "tokenise"),
    ],
)
def test_wrong_data_are_named(data, model, says):
    with pytest.raises(CalibrationDataError, match=says):
        as_batches(data, model)


def test_the_example_has_two_rows():
    _, kwargs = example_call(((), {"input_ids": tokens(1), "use_cache": False}))
    assert kwargs["input_ids"].shape[0] == 2


def test_a_huggingface_model_brings_its_own_example():
    _, kwargs = only_example(None, LLAMA)
    assert kwargs["input_ids"].dim() == 2
