"""A GPU that is not there: what Inductor and Triton ask of a device, answered from a table.

With :func:`fake_gpu` Inductor generates, and Triton compiles to machine code, as it would on the
device; nothing is launched. These hooks touch privates of Inductor, Dynamo and Triton; all of them
are undone when the context ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import hints, triton_helpers, triton_heuristics
from torch.utils import _triton as triton_utils
from triton.backends.compiler import GPUTarget

from fp4compile.lowering.gpus import AMD, Gpu

# They remember the device of their first call.
_CACHED = (triton_utils.has_triton, triton_utils.triton_backend, hints.DeviceProperties.create)
_SETTINGS = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "use_static_triton_launcher": False,
    # Folding would run kernels on the device.
    "joint_graph_constant_folding": False,
}


@contextlib.contextmanager
def fake_gpu(gpu: Gpu) -> Iterator[list[Any]]:
    """Inductor and Triton see ``gpu``; yields the list to which every autotuner is added whose
    kernels were compiled meanwhile (their ``compile_results``).
    """
    compiled: list[Any] = []
    # Registers all of them now: what is registered within patch.dict is gone with it.
    device_interface.get_registered_device_interfaces()
    with contextlib.ExitStack() as stack:
        for change in (*_torch_patches(gpu), *_triton_patches(gpu), *_launch_patches(compiled)):
            stack.enter_context(change)
        stack.callback(_clear_caches)
        _clear_caches()
        stack.enter_context(inductor_config.patch(_SETTINGS))
        yield compiled


def _clear_caches() -> None:
    for function in _CACHED:
        function.cache_clear()


def _properties(gpu: Gpu) -> SimpleNamespace:
    return SimpleNamespace(
        name=gpu.product,
        major=gpu.major,
        minor=gpu.minor,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=gpu.registers,
        max_threads_per_multi_processor=gpu.threads,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=gpu.shared_memory,
        warp_size=gpu.warp,
        total_memory=1 << 36,
        L2_cache_size=1 << 25,
        gcnArchName=str(gpu.capability),
    )


def _torch_patches(gpu: Gpu) -> Iterator[Any]:
    properties = _properties(gpu)
    if gpu.vendor == AMD:
        yield patch.object(torch.version, "hip", "7.0")
    interface = _interface(gpu, properties)
    yield patch.dict(device_interface.device_interfaces, {"cuda": interface, "cuda:0": interface})
    # is_available stays False: Dynamo would go on to ask for the device's random state.
    for name, value in (
        ("get_device_properties", properties),
        ("get_device_capability", (gpu.major, gpu.minor)),
        ("current_device", 0),
        ("device_count", 1),
    ):
        yield patch.object(torch.cuda, name, _constant(value))
    yield patch.object(torch._C, "_cuda_getCurrentRawStream", _constant(0), create=True)
    # It builds its patterns on the device that it is given.
    lazy_init = joint_graph.lazy_init
    yield patch.object(joint_graph, "lazy_init", lambda *_: lazy_init(torch.device("cpu")))


def _interface(gpu: Gpu, properties: SimpleNamespace) -> type:
    class FakeInterface(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            get_device_properties = staticmethod(_constant(properties))
            current_device = staticmethod(_constant(0))

        is_available = staticmethod(_constant(True))
        get_compute_capability = staticmethod(_constant(gpu.capability))
        get_device_properties = staticmethod(_constant(properties))
        current_device = staticmethod(_constant(0))
        device_count = staticmethod(_constant(1))
        exchange_device = staticmethod(_constant(0))
        maybe_exchange_device = staticmethod(_constant(0))
        set_device = staticmethod(_constant(None))
        synchronize = staticmethod(_constant(None))
        is_bf16_supported = staticmethod(_constant(True))
        is_triton_capable = staticmethod(_constant(True))
        raise_if_triton_unavailable = staticmethod(_constant(None))
        get_raw_stream = staticmethod(_constant(0))

    return FakeInterface


def _triton_patches(gpu: Gpu) -> Iterator[Any]:
    target = GPUTarget(gpu.vendor, gpu.capability, gpu.warp)
    driver = SimpleNamespace(
        get_current_target=_constant(target),
        get_current_device=_constant(0),
        get_current_stream=_constant(0),
        get_active_torch_device=_constant(torch.device("cuda", 0)),
        utils=SimpleNamespace(
            get_device_properties=_constant({"max_shared_mem": gpu.shared_memory})
        ),
    )
    # Not set_active and reset_active: the latter asks for a real device.
    yield patch.object(triton.runtime.driver, "_active", driver)
    yield patch.object(triton_helpers, "set_driver_to_gpu", _constant(None))


def _launch_patches(compiled: list[Any]) -> Iterator[Any]:
    autotuner = triton_heuristics.CachingAutotuner
    precompile = autotuner._precompile_worker

    def collect(self: Any) -> None:
        precompile(self)
        compiled.append(self)

    yield patch.object(autotuner, "_precompile_worker", collect)
    for name in ("_make_launchers", "_dynamic_scale_rblock"):
        yield patch.object(autotuner, name, _constant(None))


def _constant(value: Any) -> Any:
    return lambda *_, **__: value
