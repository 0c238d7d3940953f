"""Other libraries' linear layers on 4-bit weights in groups of 32, for ``bench gemm`` on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.peers import not_installed

GROUP = 32
# Bits of a weight with its scale in bfloat16 or float16.
BITS = 4 + 16 / GROUP


@dataclass(frozen=True)
class GemmPeer:
    """``make(N, K, threads)``: a layer with random weights, called with x ``[M, K]``, which
    ``given`` turns into what the layer takes; ``needs``: modules it imports.
    """

    make: Callable[[int, int, int], Callable[[Any], Any]]
    given: Callable[[Tensor], Any]
    needs: tuple[str, ...] = ()


def _torch_int4(N: int, K: int, threads: int) -> Callable[[Tensor], Tensor]:
    codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(K // GROUP, N, 2).to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def _onnx_runtime(N: int, K: int, threads: int) -> Callable[[Any], Any]:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    codes = torch.randint(0, 256, (N, K // GROUP, GROUP // 2), dtype=torch.uint8).numpy()
    constants = {"codes": codes, "scales": torch.rand(N * K // GROUP).numpy()}
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,  # rounds x to int8, the fastest
    )
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", width])]
        for name, width in (("x", K), ("y", N))
    ]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "linear", *ends, held), opset_imports=opsets, ir_version=8
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})


def _openvino(N: int, K: int, threads: int) -> Callable[[Any], Any]:
    import numpy
    import openvino
    from openvino import opset13

    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8).numpy()
    codes = openvino.op.Constant(
        openvino.Tensor(packed, openvino.Shape([N, K // GROUP, GROUP]), openvino.Type.u4)
    )
    scales = torch.rand(N, K // GROUP, 1).numpy().astype(numpy.float16)
    centred = opset13.subtract(
        opset13.convert(codes, numpy.float16), opset13.constant(numpy.float16(8))
    )
    grouped = opset13.multiply(centred, opset13.constant(scales))
    weight = opset13.convert(
        opset13.reshape(grouped, opset13.constant([N, K]), special_zero=False), numpy.float32
    )
    x = opset13.parameter([-1, K], numpy.float32)
    model = openvino.Model([opset13.matmul(x, weight, False, True)], [x])
    compiled = openvino.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()
    return lambda x: request.infer([x])


def _bitsandbytes(N: int, K: int, threads: int) -> Callable[[Tensor], Tensor]:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, quant_type="fp4")
    return torch.inference_mode()(layer.to(torch.bfloat16).to("cpu"))


def as_bfloat16(x: Tensor) -> Tensor:
    """What layers with weights in bfloat16 take."""
    return x.to(torch.bfloat16)


GEMM_PEERS = {
    "torch int4": GemmPeer(_torch_int4, as_bfloat16),
    "onnxruntime int4": GemmPeer(_onnx_runtime, Tensor.numpy, ("onnx", "onnxruntime")),
    "openvino u4": GemmPeer(_openvino, Tensor.numpy, ("openvino",)),
    "bitsandbytes fp4": GemmPeer(_bitsandbytes, as_bfloat16, ("bitsandbytes",)),
}


def absent(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    return not_installed(GEMM_PEERS[name].needs)
