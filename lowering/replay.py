"""The kernel calls of generated code, recorded once and made again by one native call.

Between two decode steps the addresses of weights, caches and buffers are the same, so Python need
not allocate, view and pass them again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fp4compile.lowering.inductor import load_native, namespace

_SOURCE = Path(__file__).parent / "templates" / "replay.cpp"
MAX_ARGUMENTS = 64  # as in the source


class Recording(TorchDispatchMode):
    """What is called while it is entered.

    ``obstacle``: why the calls cannot be repeated, or None. ``tensors``: all that were passed;
    their memory must stay where it is.
    """

    def __init__(self, runs: Iterable[Callable[..., Any]]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.obstacle: str | None = None
        self._calls: list[tuple[int, tuple[int, ...]]] = []
        self._patches = ExitStack()
        self._namespaces: dict[int, dict[str, Any]] = {}
        for run in runs:
            found = namespace(run)
            if found is None:
                self.obstacle = "a region that AOTAutograd wraps"
            else:
                self._namespaces[id(found)] = found

    def __enter__(self) -> Recording:
        for names in self._namespaces.values():
            kernels = {name: value for name, value in names.items() if _is_kernel(value)}
            recorded = {name: self._recorded(kernel) for name, kernel in kernels.items()}
            self._patches.enter_context(patch.dict(names, recorded))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.obstacle = f"{func} is no kernel"
        return func(*args, **(kwargs or {}))

    def _recorded(self, kernel: Callable[..., None]) -> Callable[..., None]:
        address = _address(kernel)

        def call(*arguments: Any) -> None:
            if any(type(value) not in (Tensor, int) for value in arguments):
                self.obstacle = "an argument that is neither tensor nor integer"
            elif len(arguments) > MAX_ARGUMENTS:
                self.obstacle = f"a kernel of {len(arguments)} arguments"
            else:
                tensors = [value for value in arguments if isinstance(value, Tensor)]
                self.tensors += tensors
                numbers = (v.data_ptr() if isinstance(v, Tensor) else v for v in arguments)
                self._calls.append((address, tuple(numbers)))
            kernel(*arguments)

        return call

    def replay(self) -> Callable[[], None]:
        """A function that makes all calls again; the caller keeps ``tensors`` where they are.

        It raises RuntimeError with what a kernel throws, as the generated code does.
        """
        addresses = [address for address, _ in self._calls]
        counts = [len(numbers) for _, numbers in self._calls]
        flat = [number for _, numbers in self._calls for number in numbers]
        arguments = (
            (ctypes.c_void_p * len(addresses))(*addresses),
            (ctypes.c_int64 * len(counts))(*counts),
            (ctypes.c_int64 * len(flat))(*flat),
            len(addresses),
        )
        native = _native()

        def replay() -> None:
            thrown = native(*arguments)
            if thrown is not None:
                raise RuntimeError(thrown.decode())

        return replay


def _is_kernel(value: Any) -> bool:
    """Whether ``value`` is a C++ kernel as Inductor binds it to Python."""
    return (
        type(value) is type(len)
        and value.__name__ == "kernel"
        and getattr(getattr(value, "__self__", None), "__file__", None) is not None
    )


def _address(kernel: Any) -> int:
    library = ctypes.CDLL(kernel.__self__.__file__)
    address = ctypes.cast(library.kernel, ctypes.c_void_p).value
    assert address is not None
    return address


@cache
def _native() -> Any:
    function = load_native(_SOURCE.read_text()).replay
    function.argtypes = (
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_int64),
        ctypes.POINTER(ctypes.c_int64),
        ctypes.c_int64,
    )
    function.restype = ctypes.c_char_p
    return function
