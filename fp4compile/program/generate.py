"""``generate`` with a static key-value cache, so that a decode step writes in place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from fp4compile.program.decode_inputs import DecodeInputs
from fp4compile.program.dispatch import Dispatcher

# Arguments of ``generate`` that decide the cache themselves or need one that can be cut back.
_OTHERWISE = (
    "past_key_values",
    "cache_implementation",
    "cache_config",
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "custom_generate",
    "is_assistant",
    "speculation_type",
    "use_mtp",
)
_PREPARE = "prepare_inputs_for_generation"


class GenerateWithStaticCache:
    """Stands in for ``model.generate``: asks for a static cache where nothing else is asked for.

    Its steps are calls of one model that nobody changes in between.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._generate: Callable[..., Any] = type(model).generate.__get__(model)
        functools.update_wrapper(self, self._generate)

    def __reduce__(self) -> Any:
        # What it wraps is found again; transformers' decorators cannot be pickled.
        return GenerateWithStaticCache, (self._model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and self._may_choose(kwargs):  # the second one is a generation config
            _ask_for_static_cache(kwargs)
        call = self._model._compiled_call_impl
        inputs = vars(self._model).get(_PREPARE)
        with ExitStack() as steady:
            if isinstance(call, Dispatcher):
                steady.enter_context(call.steady())
            if isinstance(inputs, DecodeInputs):
                steady.enter_context(inputs.steady())
            return self._generate(*args, **kwargs)

    def _may_choose(self, kwargs: dict[str, Any]) -> bool:
        config = kwargs.get("generation_config") or self._model.generation_config
        use_cache = kwargs.get("use_cache", config.use_cache)
        asked = [kwargs.get(name, getattr(config, name, None)) for name in _OTHERWISE]
        return use_cache is not False and all(value is None or value is False for value in asked)


def _ask_for_static_cache(kwargs: dict[str, Any]) -> None:
    config = kwargs.get("generation_config")
    if config is None:
        kwargs["cache_implementation"] = "static"
        return
    # Transformers does not like both; and the caller's own stays as it is.
    kwargs["generation_config"] = config = copy.copy(config)
    config.cache_implementation = "static"


def use_static_cache(model: Any) -> None:
    """Let ``model.generate`` ask for a static cache, if ``model`` can have one."""
    if _takes_static_cache(model) and "generate" not in vars(model):
        vars(model)["generate"] = GenerateWithStaticCache(model)
        if _PREPARE not in vars(model) and _prepares_as_all_do(model):
            vars(model)[_PREPARE] = DecodeInputs(model)


def leave_generate(model: Any) -> None:
    """Undo :func:`use_static_cache`."""
    for name, ours in (("generate", GenerateWithStaticCache), (_PREPARE, DecodeInputs)):
        if isinstance(vars(model).get(name), ours):
            del vars(model)[name]


def _prepares_as_all_do(model: Any) -> bool:
    """Whether ``model`` has no way of its own to make the inputs of a step."""
    where = getattr(type(model), _PREPARE).__module__
    return where == "transformers.generation.utils" and not hasattr(
        model, "create_masks_for_generate"
    )


def _takes_static_cache(model: Any) -> bool:
    """Whether ``model`` generates, and every layer of its cache can be of fixed length."""
    if not hasattr(model, "generate") or not getattr(model, "_can_compile_fullgraph", False):
        return False
    if model.config.is_encoder_decoder:
        return False
    layers = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return set(layers or ()) <= {"full_attention"}
