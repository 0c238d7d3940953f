"""What a model is worth: perplexity on a text, distance from another model, speed and size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from tqdm import tqdm

from fp4compile.errors import EvaluationError

# Tokens that a key-value cache sees first: a quantized one decides the scales of keys by them.
PROMPT = 64


@dataclass(frozen=True)
class PerplexityResult:
    """``perplexity == exp(nll / tokens)``; ``nll`` is the sum over the scored tokens, in nats."""

    perplexity: float
    tokens: int
    nll: float


@torch.no_grad()
def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    progress: bool = False,
    new_cache: Callable[[], Any] | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model on one long text.

    The text is cut into windows without overlap and without special tokens; each window scores
    its last ``window - 1`` tokens, and a last incomplete window is left out. Compare numbers of
    equal ``window`` and ``tokens`` only.

    Args:
        token_ids: the tokens of the text, of shape ``[T]`` or ``[1, T]``.
        max_tokens: score at most so many tokens, in whole windows; None scores all.
        new_cache: makes a key-value cache of transformers for each window, which is then read in
            two calls: the first :data:`PROMPT` tokens, and the rest.

    Raises:
        EvaluationError: there is not one whole window to score.
    """
    windows = _windows(token_ids, window, max_tokens)
    nll = 0.0
    for ids in tqdm(windows, desc="perplexity", unit="window", disable=not progress):
        logits = _window_logits(model, ids, new_cache)
        nll += _nll(logits, ids)
    tokens = len(windows) * (window - 1)
    return PerplexityResult(_exp(nll / tokens), tokens, nll)


@dataclass(frozen=True)
class DivergenceResult(PerplexityResult):
    """A model's perplexity, and how far its probabilities of the next token are from a
    reference's: ``divergence`` is the mean over ``tokens`` of the Kullback-Leibler divergence
    KL(reference || model) in nats, ``standard_error`` that of the mean if tokens were independent,
    ``agreement`` the share of tokens where both find the same token likeliest.
    """

    divergence: float
    standard_error: float
    agreement: float


@torch.no_grad()
def divergence(
    model: nn.Module,
    reference: nn.Module,
    token_ids: Tensor,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    progress: bool = False,
    new_cache: Callable[[], Any] | None = None,
) -> DivergenceResult:
    """:func:`perplexity`, and in the same pass over the text how far ``model`` is from
    ``reference``, usually the model before it was quantized. It tells differences that are chance
    in perplexity, where errors that happen to raise the probability of the text's own tokens count
    as gains.

    Args: as those of :func:`perplexity`; ``new_cache`` is for ``model``.

    Raises:
        EvaluationError: there is not one whole window, or the vocabularies differ in size.
    """
    found, same, nll = [], 0, 0.0
    windows = _windows(token_ids, window, max_tokens)
    for ids in tqdm(windows, desc="divergence", unit="window", disable=not progress):
        wanted = _window_logits(reference, ids).cpu()
        logits = _window_logits(model, ids, new_cache).cpu()
        if logits.shape != wanted.shape:
            raise EvaluationError(
                f"the model tells {logits.shape[-1]} tokens apart, the reference "
                f"{wanted.shape[-1]}; compare models of one vocabulary"
            )
        log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
        found.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        nll += _nll(logits, ids)
        same += int((wanted.argmax(-1) == logits.argmax(-1)).sum())
    each = torch.cat(found).to(torch.float64)
    error = each.std(correction=0).item() / math.sqrt(len(each))
    count = len(each)
    distance = each.mean().item(), error, same / count
    return DivergenceResult(_exp(nll / count), count, nll, *distance)


def _windows(token_ids: Tensor, window: int, max_tokens: int | None) -> Tensor:
    """``[windows, window]`` of the text's tokens."""
    flat = token_ids.reshape(-1)
    count = _window_count(flat.numel(), window, max_tokens)
    return flat[: count * window].view(count, window)


def _window_count(tokens: int, window: int, max_tokens: int | None) -> int:
    if window < 2:
        raise EvaluationError(f"window={window} scores nothing; it takes at least 2 tokens")
    count = tokens // window
    if max_tokens is not None:
        count = min(count, max_tokens // (window - 1))
    if count == 0:
        raise EvaluationError(
            f"{tokens} tokens (max_tokens={max_tokens}) hold no whole window of {window} tokens; "
            "give a longer text, more max_tokens or a smaller window"
        )
    return count


def _window_logits(
    model: nn.Module, ids: Tensor, new_cache: Callable[[], Any] | None = None
) -> Tensor:
    """float32 ``[window - 1, vocabulary]``: of all tokens but the last, on the model's device."""
    ids = ids[None].to(next(model.parameters()).device)
    if new_cache is None:
        logits = _logits(model(ids))
    else:
        cache = new_cache()
        parts = (ids[:, :PROMPT], ids[:, PROMPT:])
        logits = torch.cat(
            [_logits(model(part, past_key_values=cache)) for part in parts if part.numel()], dim=1
        )
    return logits[0, :-1].float()


def _nll(logits: Tensor, ids: Tensor) -> float:
    """Of a window's tokens but the first."""
    return F.cross_entropy(logits, ids[1:].to(logits.device), reduction="sum").item()


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _exp(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Spread:
    """A repeated measurement: ``low <= median <= high``."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class GenerationSpeed:
    """Tokens per second of ``generate`` at batch 1: the prompt's, and the new ones' after the
    first (which the prefill yields).
    """

    prefill: Spread
    decode: Spread
    prompt_tokens: int
    new_tokens: int


def measure_generation_speed(
    model: Any,
    input_ids: Tensor,
    new_tokens: int,
    *,
    repeats: int = 3,
    progress: bool = False,
) -> GenerationSpeed:
    """Times greedy ``model.generate`` as a user calls it, after one untimed round that compiles.

    Decode is the time of ``new_tokens`` less that of one new token, hence without the prefill.

    Args:
        input_ids: the prompt, of shape ``[1, T]``.
        new_tokens: how many to generate, at least 2; an end-of-text token does not stop early.
    """
    if new_tokens < 2:
        raise EvaluationError(
            f"new_tokens={new_tokens} leaves nothing to time after the first token"
        )
    prefill, decode = [], []
    prompt_tokens = input_ids.shape[-1]
    rounds = tqdm(range(repeats + 1), desc="generation", unit="round", disable=not progress)
    for index in rounds:
        first = _generation_seconds(model, input_ids, 1)
        # The floor is for a timer's noise, not for a real decode.
        rest = max(_generation_seconds(model, input_ids, new_tokens) - first, 1e-9)
        if index > 0:
            prefill.append(prompt_tokens / first)
            decode.append((new_tokens - 1) / rest)
    return GenerationSpeed(Spread.of(prefill), Spread.of(decode), prompt_tokens, new_tokens)


@torch.no_grad()
def _generation_seconds(model: Any, input_ids: Tensor, new_tokens: int) -> float:
    _synchronize(input_ids.device)
    start = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
    )
    _synchronize(input_ids.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class ModelSize:
    """``bytes`` of all parameters and buffers, scales and packing included, and how many
    ``weights`` (logical elements of the parameters) they stand for.
    """

    bytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


def model_size(model: nn.Module) -> ModelSize:
    """Size of a model's tensors: shared ones count once, tensor subclasses by what they hold."""
    seen: dict[object, int] = {}
    weights = 0
    for tensor in chain(model.parameters(), model.buffers()):
        before = len(seen)
        seen.update((_identity(leaf), leaf.nbytes) for leaf in _leaves(tensor))
        if len(seen) > before and isinstance(tensor, nn.Parameter):
            weights += tensor.numel()
    return ModelSize(sum(seen.values()), weights)


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a (possibly nested) tensor subclass consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _leaves(getattr(tensor, name))


def _identity(leaf: Tensor) -> object:
    """Equal for two tensors on the same memory (tied weights need not be one Python object)."""
    pointer = leaf.untyped_storage().data_ptr() if leaf.device.type != "meta" else 0
    # Empty and meta tensors have no memory to share.
    return (leaf.device, pointer, leaf.storage_offset(), leaf.shape) if pointer else id(leaf)
