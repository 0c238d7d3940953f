"""Imports go one way: each room knows only the rooms before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Rooms in one set know nothing of each other; rooms that are not listed are free within fp4compile.
ROOMS: tuple[set[str], ...] = (
    {"formats"},
    {"qparams"},
    {"numerics"},
    {"blocks"},
    {"packing", "operand"},
    {"ops", "weights"},
    {"tensor"},
    {"observers", "search"},
    {"passes"},
    {"program"},
    {"compile"},
    {"api"},
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

BANNED = ("fp4compile.lowering", "torch._inductor", "triton")


def _folder(package: str) -> Path:
    # As installed, be it from the source tree or from a wheel.
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


CORE = _folder("fp4compile")
LOWERING = _folder("fp4compile.lowering")
# In a wheel, lowering/ lies inside the package.
CORE_FILES = sorted(path for path in CORE.rglob("*.py") if LOWERING not in path.parents)
RANKED_FILES = [
    path for path in CORE_FILES if path.relative_to(CORE).with_suffix("").parts[0] in RANK
]


def _imports(path: Path) -> Iterator[str]:
    """Every module that the file may import, in functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "_inductor":
            yield "torch._inductor"


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _name(path: Path) -> str:
    return path.relative_to(CORE).as_posix()


@pytest.mark.parametrize("path", CORE_FILES, ids=_name)
def test_only_lowering_knows_the_compiler(path: Path) -> None:
    assert not [name for name in _imports(path) if any(_within(name, ban) for ban in BANNED)]


@pytest.mark.parametrize("path", RANKED_FILES, ids=_name)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    room = path.relative_to(CORE).with_suffix("").parts[0]
    parts = [name.split(".") for name in _imports(path) if _within(name, "fp4compile")]
    known = {part[1] for part in parts if len(part) > 1 and part[1] in RANK} - {room}
    assert not {other for other in known if RANK[other] >= RANK[room]}


def test_every_room_is_there() -> None:
    assert {path.relative_to(CORE).with_suffix("").parts[0] for path in RANKED_FILES} == set(RANK)
