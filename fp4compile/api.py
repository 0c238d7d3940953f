"""The public pipeline, one line per stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fp4compile import integrations
from fp4compile.batches import as_batches, example_call, only_example
from fp4compile.compile import compile_model, load_lowerings, uncompiled
from fp4compile.coverage import verify
from fp4compile.errors import AlreadyQuantizedError, NonFiniteError
from fp4compile.page import check_writable, write_page
from fp4compile.parametrized import computed_once
from fp4compile.passes import PASSES
from fp4compile.passes.plan import Rewrite, commit
from fp4compile.pipeline import decide
from fp4compile.qparams import QuantSpec, TensorSpec
from fp4compile.recipe import Recipe, as_recipe
from fp4compile.report import Report, make_report
from fp4compile.search import SearchOptions, by_method
from fp4compile.selection import Selector, as_spec, select, with_overrides, without_embeddings
from fp4compile.tensor import FP4Tensor
from fp4compile.trace import trace

logger = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    calib_data: Any = None,
    spec: str | QuantSpec = "w4a4",
    *,
    method: str = "fpq",
    search: SearchOptions | None = None,
    tokenizer: Any = None,
    recipe: Recipe | str | Path | None = None,
    targets: Sequence[Selector] | None = None,
    ignore: Sequence[Selector] | None = None,
    overrides: Mapping[Selector, str | QuantSpec] | None = None,
    sequential: bool = False,
    progress: bool = True,
    max_memory: int | str | None = None,
    calibration_dir: str | Path | None = None,
    process_group: Any = None,
    report: str | Path | None = None,
    attention: bool | TensorSpec = False,
) -> nn.Module:
    """Quantize ``model`` in place to FP4 weights and activations, without training.

    Args:
        model: any ``nn.Module`` whose forward ``torch.export`` can trace; Hugging Face models too,
            and what ``torch.compile`` returned.
        calib_data: what the forward is calibrated on: an iterable of tensors, tuples or dicts, a
            DataLoader, a ``datasets.Dataset`` with tokenised columns, or a list of strings with
            ``tokenizer``. None: a bundled English text (needs ``tokenizer``; a warning says so).
        spec: ``"w4a4"``, ``"w4a8"``, ``"w4a16"``, ``"w6a6"``, ``"w8a8"`` (bits of weights and
            activations; embedding and head follow the weights), or a :class:`QuantSpec`.
        method: ``"best"`` (block scales, rotation and exponent shifts), ``"fpq"`` (LLM-FP4),
            ``"fpq_baseline"`` (without exponent shifts) or ``"minmax"``.
        search: what the search does beyond that, see :class:`SearchOptions`.
        recipe: decisions of an earlier run (``model.fp4_report.recipe``, or a path to its JSON);
            nothing is calibrated or searched then.
        targets, ignore: which weights to quantize, and which not: globs on their names
            (``"*.down_proj"``), ``"re:<regex>"``, module classes, or predicates
            ``(name, module) -> bool``.
        overrides: another ``spec`` for some weights, by the same selectors; the first that
            matches counts: ``{"*.down_proj": "w4a8"}``.
        sequential: calibrate each layer on the outputs of the already quantized ones, not on
            those of the full-precision model.
        progress: show a progress bar.
        max_memory: what calibration may add to the memory in use: bytes, or text like ``"2GiB"``.
            None: half of the RAM that is available. Beyond it, hidden states go to disk and the
            search gets a smaller sample of tokens.
        calibration_dir: a directory that keeps every decision as it is made; the same call with
            the same directory goes on after an interruption, with the same result.
        process_group: the processes that calibrate together, each called with the same
            arguments; None: all, where torch.distributed is initialised.
        report: an .html file to write the report to: one self-contained page with what was
            decided, why, and where the error is.
        attention: quantize the operands of attention's products too (queries, keys,
            probabilities, values), at the bits of activations or by a spec of their own; for models
            of transformers.

    Returns:
        ``model`` itself, in eval mode, its parameters frozen. ``model.fp4_report`` tells what
        was done per site.

    Raises:
        Fp4CompileError: a subclass names the mistake. The model is then as it was.
    """
    started = time.monotonic()
    spec = as_spec(spec)
    by_method(method)
    wrapper, model = model, uncompiled(model)
    if report is not None:
        check_writable(report)
    _check_model(model)
    with _evaluating(model), torch.no_grad(), computed_once(model) as computed:
        if recipe is None:
            batches = as_batches(calib_data, model, tokenizer)
        else:
            batches = [only_example(calib_data, model, tokenizer)]
        example = example_call(batches[0])
        graph = with_overrides(trace(model, *example), model, overrides or {})
        sites, left_out = select(graph, model, targets, ignore)
        sites, embeddings = without_embeddings(sites, spec)
        graph = replace(graph, sites=sites, skipped={**graph.skipped, **left_out, **embeddings})
        with _new_tensors_where(model):
            if recipe is None:
                decided = decide(
                    model,
                    graph,
                    batches,
                    spec,
                    method,
                    search=search,
                    sequential=sequential,
                    progress=progress,
                    max_memory=max_memory,
                    calibration_dir=calibration_dir,
                    process_group=process_group,
                )
            else:
                decided = as_recipe(recipe).decisions(graph)
        products = integrations.decide_products(
            model, batches, spec, method, attention, from_recipe=recipe is not None
        )
        rewrite = Rewrite(model, graph, decided)
        with _new_tensors_where(model):
            for rewrite_pass in PASSES:
                rewrite = rewrite_pass(rewrite)
        made: Report = make_report(rewrite, spec, method, time.monotonic() - started, products)
        if report is not None:
            write_page(made, report)  # before the model changes: it may fail
        computed.restore(but=rewrite.parameters)
    commit(rewrite)
    integrations.attach_attention(model, products)
    model.fp4_report = replace(made, example=example)  # type: ignore[assignment]  # a plain attribute, not a parameter
    integrations.attach(model)
    logger.info("%s", made.summary())
    return wrapper


def quantize_and_compile(
    model: nn.Module,
    calib_data: Any = None,
    spec: str | QuantSpec = "w4a4",
    *,
    programs: bool = True,
    report: str | Path | None = None,
    **options: Any,
) -> nn.Module:
    """:func:`quantize`, then compile the model's forward with Inductor.

    ``programs`` is that of :func:`compile_model`, all other arguments those of :func:`quantize`.
    The first call of each kind compiles (one is made here, for :func:`verify`, whose summary is
    logged); forward and ``generate`` then run compiled, prefill and decode alike.
    """
    load_lowerings()  # what cannot compile here shall fail before minutes of calibration
    if report is not None:
        check_writable(report)
    compiled = compile_model(quantize(model, calib_data, spec, **options), programs=programs)
    if report is not None:
        made: Any = uncompiled(compiled).fp4_report  # names the kernels now
        write_page(made, report)
    if uncompiled(compiled) is compiled:  # what torch.compile returned has the caller's backend
        logger.info("%s", verify(compiled).summary())
    return compiled


def _check_model(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, FP4Tensor):
            raise AlreadyQuantizedError(
                f"{name} is already an FP4 weight; load the full-precision model again to "
                "quantize it differently"
            )
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"parameter {name} holds NaN or infinity; repair the checkpoint before quantizing"
            )


def _new_tensors_where(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, tensors are made on the device that ``model`` is on unless they name another."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # Every call of torch passes through what torch.device puts up.
    return nullcontext() if device.type == "cpu" else cast(AbstractContextManager[Any], device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; a failure puts every module's mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    except BaseException:
        for module, training in modes.items():
            module.training = training
        raise
