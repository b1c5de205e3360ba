"""lm-evaluation-harness on a model in this process: its tasks, its prompts, its metrics.

A task is one of the harness's own, which it downloads, or a YAML file in a folder of yours, which may name data on this
machine. An adapter is merged before (`models.trained`), so that the harness needs to know nothing of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    """as the harness names it, with its filter: ``acc``, ``exact_match (strict-match)``"""
    value: float
    stderr: float | None
    """standard error; None: the harness gives none"""
    examples: int | None
    """of the task; None: of a group of tasks"""


def score_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    batch_size: int = 8,
    examples: int = 0,
    fewshot: int | None = None,
    chat: bool = False,
) -> list[TaskScore]:
    """Scores of `tasks` by ``lm_eval.simple_evaluate``.

    Args:
        model: a whole causal language model in eval mode.
        tokenizer: its own.
        tasks: names, as ``lm_eval ls tasks`` lists them and as YAML files in `include_path` say.
        include_path: folder with tasks of your own.
        batch_size: requests at a time.
        examples: of each task, the first ones; 0: all.
        fewshot: examples in the prompt; None: as each task says.
        chat: prompts are messages of a user, in the tokenizer's own chat template.

    Raises:
        ConfigError: the package lm_eval is missing, there is no such task, or the harness cannot do it (data that is
            not there, say).
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"Expected the package lm_eval for tasks, found none: {error}. Run: pip install 'hsplit_flwr[harness]'."
        ) from error
    manager = _manager(tasks, include_path)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=harness,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=fewshot,
            limit=examples or None,
            apply_chat_template=chat,
            log_samples=False,
        )
    # The harness and the libraries below raise errors of many kinds for data and metrics that are not there.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"Expected lm_eval to run {', '.join(tasks)}, found: {type(error).__name__}: {reason:.300}. Check the "
            "task's data; without a network, give data on this machine (docs/data.md)."
        ) from error
    return _scores(found)


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """The harness's index of tasks: of `include_path` alone where that is enough, as its own take seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"Expected a folder with YAML files of tasks as --include-path, found {include_path}.")
    folder = str(include_path) if include_path else None
    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=folder)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise ConfigError(
            f"Expected tasks that lm_eval knows, found {', '.join(unknown)}. See `lm_eval ls tasks`, or give the "
            "folder with its YAML file (--include-path)."
        )
    return manager


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    """The harness's ``{"acc,none": 0.5, "acc_stderr,none": 0.1, ...}`` by task as scores."""
    scores = []
    for task, metrics in found["results"].items():
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    examples=count,
                )
            )
    return scores


def task_table(scores: Sequence[TaskScore]) -> str:
    """The scores for people."""
    rows = [
        [
            *(one.task, one.metric, f"{one.value:.4f}", "-" if one.stderr is None else f"{one.stderr:.4f}"),
            "-" if one.examples is None else str(one.examples),
        ]
        for one in scores
    ]
    return format_table(["task", "metric", "value", "stderr", "examples"], rows, markdown=False, left_aligned=2)


def save_scores(scores: Sequence[TaskScore], path: Path) -> None:
    """Write them as JSON.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(json.dumps([asdict(one) for one in scores], indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Expected a file to write the scores to, found: {error}.") from error
