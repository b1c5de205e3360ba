"""One run of one method: rounds, evaluations, the virtual clock."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from transformers import PreTrainedModel

from hsplit_flwr.data.text_batches import prompt_text
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.methods import METHODS, Method
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.experiments.task import Task, spread
from hsplit_flwr.experiments.work import RoundOutcome, weighed
from hsplit_flwr.models.generation import generate_texts
from hsplit_flwr.planning.clock import RoundTimeline, play_round
from hsplit_flwr.reports.text_intervals import TextIntervals, score_with_intervals
from hsplit_flwr.reports.text_metrics import TextScores
from hsplit_flwr.training.loss import Score


class Trainer(Protocol):
    """A method at work on a task."""

    def round(self, round_number: int, present: Sequence[str]) -> RoundOutcome:
        """Round `round_number` (from 1) with the clients `present`, up to the new global model."""

    def score(self) -> Score:
        """The global model's loss on the server's held-out examples."""

    def global_model(self) -> PreTrainedModel:
        """The global model, to generate with."""


@dataclass(frozen=True)
class RunResult:
    """What a run found."""

    evaluations: tuple[Evaluation, ...]
    """state before training (round 0) and after every round"""
    timelines: tuple[RoundTimeline, ...]
    """every round on the virtual clock"""


def trainer_of(method: Method) -> Callable[[Task, Method], Trainer]:
    """The class that `method` names, imported."""
    module, _, name = method.trainer.partition(":")
    found = getattr(import_module(f"hsplit_flwr.experiments.{module}"), name)
    return cast(Callable[[Task, Method], Trainer], found)


def run(spec: RunSpec, on_round: Callable[[Evaluation], None] | None = None, device: str = "cpu") -> RunResult:
    """Train as `spec` says. Equal specs give equal results on one machine and version.

    Args:
        spec: what decides the run.
        on_round: called with every evaluation as it is made.
        device: where models compute, ``cpu`` or ``cuda``; it rounds otherwise, as another machine does.

    Raises:
        ConfigError: an unknown method or setting, a model, data set or GPU that is not there, or devices too small.
    """
    if spec.method not in METHODS:
        raise ConfigError(f"Expected a method among {sorted(METHODS)}, found {spec.method!r}.")
    method = METHODS[spec.method]
    task = Task.of(spec, device=device)
    trainer = trainer_of(method)(task, method)
    started = time.perf_counter()
    evaluations = [Evaluation.untrained(trainer.score().perplexity)]
    timelines: list[RoundTimeline] = []
    for round_number in range(1, spec.rounds + 1):
        outcome = trainer.round(round_number, task.setting.present(spec.seed, round_number))
        timelines.append(
            play_round(
                [weighed(work, task.round_weight) for work in outcome.work],
                task.devices,
                task.server,
                start_s=evaluations[-1].virtual_s,
                aggregate_flops=outcome.server_flops,
                workload=task.costs.workload,
            )
        )
        last = round_number == spec.rounds
        texts = _text_scores(trainer, task) if last and spec.text_prompts else (None, None)
        perplexity = trainer.score().perplexity
        seconds = time.perf_counter() - started
        evaluations.append(_evaluation(evaluations[-1], outcome, timelines, perplexity, seconds, *texts))
        if on_round:
            on_round(evaluations[-1])
    return RunResult(tuple(evaluations), tuple(timelines))


def _evaluation(
    before: Evaluation,
    outcome: RoundOutcome,
    timelines: Sequence[RoundTimeline],
    perplexity: float,
    wall_s: float,
    scores: TextScores | None,
    intervals: TextIntervals | None,
) -> Evaluation:
    up = sum(work.upload_bytes + work.steps * work.step_bytes_up for work in outcome.work)
    down = sum(work.download_bytes + work.steps * work.step_bytes_down for work in outcome.work)
    total_s = sum(timeline.duration_s for timeline in timelines)
    idle_s = sum(timeline.idle_share * timeline.duration_s for timeline in timelines) if outcome.work else 0.0
    return Evaluation(
        round=before.round + 1,
        perplexity=perplexity,
        train_loss=outcome.train_loss,
        tokens=before.tokens + outcome.tokens,
        virtual_s=timelines[-1].end_s,
        idle_share=idle_s / total_s if total_s else 0.0,
        bytes_up=before.bytes_up + round(up),
        bytes_down=before.bytes_down + round(down),
        clients=len(outcome.work),
        too_large=outcome.too_large,
        wall_s=wall_s,
        scores=scores,
        intervals=intervals,
    )


def _text_scores(trainer: Trainer, task: Task) -> tuple[TextScores, TextIntervals]:
    """Greedy texts for held-out meaning representations, against all their references."""
    references: dict[str, list[str]] = {}
    for example in task.held_out:
        references.setdefault(example.mr, []).append(example.ref)
    prompts = [mr for mr, _ in spread(sorted(references.items()), task.spec.text_prompts)]
    texts = generate_texts(
        trainer.global_model(),
        task.files.tokenizer(),
        [prompt_text(mr) for mr in prompts],
        max_new_tokens=task.spec.max_length // 2,
    )
    return score_with_intervals(texts, [references[mr] for mr in prompts])
