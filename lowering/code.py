"""What Inductor's generated text says: which kernel is called with which inputs of the graph."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fp4compile.generated import KernelCall
from fp4compile.kernels import REFERENCE

# name = async_compile.cpp_pybinding([...], r'''text''')
_DEFINITION = re.compile(r"^(\w+) = async_compile\.\w+\(.*?'''(.*?)'''", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"^\s*(?://|#) fp4compile (\{.*\})$", re.MULTILINE)
# def call(self, args): arg0_1, arg1_1 = args
_INPUTS = re.compile(r"^ *def call\(.*?\):\n\s+(.*?),? = args$", re.MULTILINE)
# [buf = ][torch.ops.]name(arguments)
_CALL = re.compile(r"^\s+(?:\w+ = )?([\w.]+)\((.*)\)$")
_NAME = re.compile(r"\b\w+\b")
# What a kernel computes, before its call: the operators of the user's graph.
_ORIGINS = re.compile(r"^\s*# .*Original ATen: \[(.*)\]$")
_GEMMS = ("fp4.linear", "fp4.linears")


def calls_in(code: str) -> tuple[int, tuple[KernelCall, ...]]:
    """Number of inputs of the graph whose generated ``code`` this is, and its kernel calls.

    A kernel of the templates tells in a comment what it is; what is fused with a GPU's, Inductor's
    comment before the call tells. Another kernel is Inductor's own; an fp4:: op that is called as
    it is runs the eager reference.
    """
    inputs = _INPUTS.search(code)
    if inputs is None:
        return 0, ()
    names = re.split(r",\s*", inputs[1])
    markers = {
        name: json.loads(marker[1]) if (marker := _MARKER.search(text)) else {}
        for name, text in _DEFINITION.findall(code)
    }
    positions = {name: position for position, name in enumerate(names)}
    return len(names), tuple(_calls(code[inputs.end() :], markers, positions))


def _calls(
    body: str, markers: dict[str, dict[str, Any]], positions: dict[str, int]
) -> Iterator[KernelCall]:
    operations: list[str] = []
    for line in body.splitlines():
        if origins := _ORIGINS.match(line):
            operations = origins[1].split(", ")
        match = _CALL.match(line)
        if match is None:
            continue
        # A Triton kernel is an object: name.run(arguments).
        function, arguments = match[1].removesuffix(".run"), match[2]
        if function in markers:
            about = markers[function]
            kernel, problem = about.get("kernel", "inductor"), about.get("problem", "")
            fused = about.get("epilogue", _beside_gemm(operations)) if about else ()
            epilogue = tuple(fused)
        elif function.startswith("torch.ops.fp4."):
            kernel, problem, epilogue = REFERENCE, function.removeprefix("torch.ops."), ()
        else:
            continue
        used = (positions[name] for name in _NAME.findall(arguments) if name in positions)
        yield KernelCall(kernel, problem, epilogue, frozenset(used))


def _beside_gemm(operations: list[str]) -> list[str]:
    """As a C++ kernel's marker names its epilogue: without namespaces, sorted."""
    return sorted(name.rpartition(".")[2] for name in operations if name and name not in _GEMMS)
