"""What a run leaves behind: tables, picture, summary.json, samples, merged model and PEFT adapter."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hsplit_flwr.common.provenance import commit, versions
from hsplit_flwr.errors import AggregationError, ConfigError
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.export import AdapterExport, save_merged, save_peft_adapter
from hsplit_flwr.models.generation import generate_texts
from hsplit_flwr.planning.plots import plot_budgets, plot_importance
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.reports.health.diagnosis import RunSettings, diagnose
from hsplit_flwr.reports.health.plots import plot_spectrum
from hsplit_flwr.reports.records import RunSummary
from hsplit_flwr.reports.run_picture import plot_run
from hsplit_flwr.reports.run_tables import plan_history, run_report

_log = logging.getLogger("hsplit_flwr")
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """A prompt to continue before and after training, and what a person wrote."""

    prompt: str
    reference: str


class RunOutput:
    """Collects a run's results into one folder. Create it before the run: the first samples are taken then.

    Args:
        model: the global model, still untrained.
        model_name: how a user names the base model, for the PEFT adapter.
        folder: where everything goes; created at once, so that a bad path fails before training.
        command: the command that repeats the run.
        config: the run config, for the summary.
        samples: prompts to generate from, greedily.
        adapter_rank: largest rank of the exported PEFT adapter; None: as much as exactness takes.

    Raises:
        ConfigError: the folder cannot be created.
    """

    def __init__(
        self,
        model: GlobalModel,
        model_name: str,
        folder: Path,
        *,
        command: str,
        config: Mapping[str, Any],
        samples: Sequence[Sample] = (),
        adapter_rank: int | None = None,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Expected an output folder that can be created, found {error}. Choose another output-dir."
            ) from error
        self._folder = folder
        self._model = model
        self._model_name = model_name
        self._command = command
        self._config = dict(config)
        self._samples = samples
        self._adapter_rank = adapter_rank
        self._tokenizer = model.files.tokenizer()
        self._before = self._generate(model.segment.model)
        self._commit = commit()  # that of the code which runs, not of what is checked out when it ends
        self._started = time.perf_counter()

    def __call__(self, strategy: HSplitLoRAStrategy) -> None:
        """Write the results of the finished run and log its tables."""
        wall_seconds = time.perf_counter() - self._started
        after = self._generate(strategy.tail_rounds.evaluated_model())
        strategy.merge_remaining()
        save_merged(self._model.segment.model, self._tokenizer, self._folder / "merged_model")
        adapter = self._export_adapter()
        initial = strategy.initial_score.perplexity if strategy.initial_score else None
        settings = RunSettings(strategy.training, strategy.config.rule, self._model.num_blocks)
        summary = RunSummary(
            initial_perplexity=initial,
            history=tuple(strategy.history),
            seed=strategy.training.seed,
            versions=versions(),
            commit=self._commit,
            command=self._command,
            wall_seconds=wall_seconds,
            config=self._config,
            adapter=adapter.to_dict() if adapter else None,
            health=diagnose(strategy.history, initial, settings),
            samples=tuple(
                {"prompt": s.prompt, "reference": s.reference, "before": before, "after": now}
                for s, before, now in zip(self._samples, self._before, after, strict=True)
            ),
        )
        summary.save(self._folder / "summary.json")
        plot_run(summary, self._folder / "run.png")
        plot_spectrum(summary.history, self._folder / "spectrum.png")
        report = "\n\n".join([run_report(summary), *self._plan_sections(strategy)])
        (self._folder / "report.txt").write_text(report + "\n", encoding="utf-8")
        _log.info("%s", "\n".join(["", report, "", *self._sample_lines(summary)]))

    def _plan_sections(self, strategy: HSplitLoRAStrategy) -> list[str]:
        """The plan in force at the end and how it came to be; pictures of importance and budgets."""
        planning = strategy.planning
        if planning is None or planning.in_force is None:
            return []
        plan = planning.in_force
        cuts = {client: planned.cut for client, planned in plan.clients.items()}
        source = "measured in this run" if planning.history.updates else "all equal: nothing measured"
        plot_importance(planning.profile, cuts, self._folder / "importance.png", source)
        plot_budgets(plan, planning.costs, planning.made_with, self._folder / "budgets.png")
        return [f"Plans\n{plan_history(strategy.history)}", f"Last plan\n{plan_table(plan)}"]

    def _sample_lines(self, summary: RunSummary) -> list[str]:
        lines = []
        for sample in summary.samples:
            lines += [
                f"prompt  {sample['prompt']}",
                f"before  {sample['before']}",
                f"after   {sample['after']}",
                "",
            ]
        return [*lines, f"Results: {self._folder}"]

    def _export_adapter(self) -> AdapterExport | None:
        total = self._model.log.total
        deltas = {name: total.form(name) for name in total.names()}
        transposed = any(not isinstance(m, torch.nn.Linear) for m in self._model.segment.linear_modules().values())
        try:
            return save_peft_adapter(
                deltas,
                self._model_name,
                self._folder / "adapter",
                max_rank=self._adapter_rank,
                fan_in_fan_out=transposed,
            )
        except AggregationError as error:
            _log.warning("no adapter exported: %s", error)
            return None

    def _generate(self, model: PreTrainedModel) -> list[str]:
        prompts = [sample.prompt for sample in self._samples]
        return generate_texts(model, self._tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
