"""Scores in the tasks of lm-eval (EleutherAI's evaluation harness)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fp4compile.errors import EvaluationError, MissingDependencyError


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    task_dir: Path | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Every task's metrics, as lm-eval names them (``"acc,none"``).

    Args:
        limit: questions per task; None for all.
        task_dir: directory with task files of your own, beside those that lm-eval has.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        EvaluationError: a task is unknown, or its data cannot be loaded.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "tasks are scored by lm-eval, not installed here; run: pip install 'fp4compile[eval]'"
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if task_dir is None else str(task_dir))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise EvaluationError(
            f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and "
            "--task-dir adds your own"
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"lm-eval could not run {', '.join(tasks)}: {error}") from error
    return {task: _metrics(found["results"][task]) for task in tasks}


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, float)}
