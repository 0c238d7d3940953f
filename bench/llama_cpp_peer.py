"""llama.cpp as a peer of ``bench model``, driven as a transformers model is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONTEXT = 2048


class LlamaCpp:
    """The demo's model from the GGUF file in which it comes, 4 bits in blocks of 32 (Q4_1)."""

    def __init__(self) -> None:
        from llama_cpp import Llama, llama_get_logits_ith

        from fp4compile.demo_model import gguf_path

        self._logits_at = llama_get_logits_ith
        threads = torch.get_num_threads()
        self._llama = Llama(
            str(gguf_path()),
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
