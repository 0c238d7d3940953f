"""llama.cpp as a peer of ``bench model``, driven as a transformers model is."""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTEXT = 2048


class LlamaCpp:
    """The demo's model from the GGUF file in which it comes, 4 bits in blocks of 32 (Q4_1), or
    rounded again to another type: its speed is what counts.

    Args:
        file_type: the suffix of a ``LLAMA_FTYPE_MOSTLY_`` constant, such as ``"Q4_0"``.
    """

    def __init__(self, file_type: str) -> None:
        from llama_cpp import Llama, llama_get_logits_ith

        from fp4compile.demo_model import gguf_path

        self._logits_at = llama_get_logits_ith
        threads = torch.get_num_threads()
        path = gguf_path()
        if file_type != "Q4_1":
            path = _requantized(path, file_type)
        self._llama = Llama(
            str(path),
            n_ctx=CONTEXT,
            n_batch=CONTEXT,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.config = SimpleNamespace(vocab_size=self._llama.n_vocab())
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def generate(self, ids: Tensor, max_new_tokens: int, streamer: Any, **_: Any) -> None:
        """Greedy; the streamer gets the prompt and then every token, as from transformers."""
        streamer.put(ids)
        self._llama.reset()
        next_tokens = ids[0].tolist()
        for _ in range(max_new_tokens):
            self._llama.eval(next_tokens)
            # Of the last position: no others are computed.
            pointer = self._logits_at(self._llama.ctx, -1)
            logits = np.ctypeslib.as_array(pointer, (self.config.vocab_size,))
            next_tokens = [int(logits.argmax())]
            streamer.put(torch.tensor(next_tokens))
        streamer.end()


def _requantized(path: Path, file_type: str) -> Path:
    """A copy of the file at ``path`` in another type, which stays until the machine tidies up."""
    import llama_cpp

    target = Path(tempfile.gettempdir(), f"{path.stem}-{file_type}.gguf")
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        params.allow_requantize = True
        partial = target.with_suffix(".partial")
        status = llama_cpp.llama_model_quantize(
            str(path).encode(), str(partial).encode(), ctypes.byref(params)
        )
        if status != 0:
            raise RuntimeError(f"llama.cpp could not write {path} as {file_type}: status {status}")
        partial.rename(target)
    return target
