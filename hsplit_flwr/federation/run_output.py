"""What a run leaves behind: summary, report, checkpoint after every round; pictures, adapter and model at the end."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.common.provenance import command as this_command
from hsplit_flwr.common.provenance import commit, versions
from hsplit_flwr.common.state import State
from hsplit_flwr.data.slots import SlotScore, score_slots
from hsplit_flwr.errors import ConfigError, HSplitError
from hsplit_flwr.federation import checkpoint
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.lora.export import AdapterExport, save_merged, save_peft_adapter
from hsplit_flwr.lora.places import ScratchFolder
from hsplit_flwr.models.generation import generate_texts
from hsplit_flwr.planning.plots import plot_budgets, plot_importance
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.reports.health.diagnosis import RunSettings, diagnose
from hsplit_flwr.reports.health.plots import plot_spectrum
from hsplit_flwr.reports.records import RunStatus, RunSummary
from hsplit_flwr.reports.run_picture import plot_run
from hsplit_flwr.reports.run_tables import plan_history, run_report

_log = logging.getLogger("hsplit_flwr")
MAX_NEW_TOKENS = 48
SUMMARY = "summary.json"
KEEP_CHECKPOINTS = 2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """A prompt to continue before and after training, and what a person wrote."""

    prompt: str
    reference: str


class RunOutput:
    """A run's results, in a folder of their own. Create it before the run: the first samples are taken then.

    Args:
        model: the global model, still untrained.
        model_name: how a user names the base model, for the PEFT adapter.
        folder: where everything goes; where a run's results are already, the first free one of FOLDER-2, FOLDER-3, ...
            Created at once, so that a bad path fails before training.
        command: the command that repeats the run; default: that of this process.
        config: the run config, for the summary.
        samples: prompts to show in the summary with what the model makes of them, before and after; greedily.
        prompts: further held-out prompts, to count what the model gets right of them (`data.slots`).
        adapter_rank: largest rank of the exported PEFT adapter; None: as much as exactness takes.
        log_samples: show `samples` in the log, too. Logs travel: to whoever streams a run, and into Flower's own files.
        keep_checkpoints: how many checkpoints stay, the last ones; 0: none is written.
        resume: the run to go on with, in its own folder: see `checkpoint.find`; empty: begin one.
        decisive: what of `config` decides the results: a run that resumes this one must have it alike.

    Raises:
        ConfigError: the folder cannot be created, there is no run to resume, or `adapter_rank` is no rank.
    """

    def __init__(
        self,
        model: GlobalModel,
        model_name: str,
        folder: Path,
        *,
        command: str = "",
        config: Mapping[str, Any] | None = None,
        samples: Sequence[Sample] = (),
        prompts: Sequence[str] = (),
        adapter_rank: int | None = None,
        log_samples: bool = False,
        keep_checkpoints: int = KEEP_CHECKPOINTS,
        resume: str = "",
        decisive: Mapping[str, Any] | None = None,
    ) -> None:
        if adapter_rank is not None and adapter_rank < 1:
            raise ConfigError(f"Expected adapter-rank >= 1, or 0 for as much as exactness takes, found {adapter_rank}.")
        require_whole("keep_checkpoints", keep_checkpoints, 0)
        self._resumed = checkpoint.find(resume, folder) if resume else None
        self._keep_checkpoints = keep_checkpoints
        self._decisive = dict(decisive or {})
        self.folder = checkpoint.run_folder(self._resumed) if self._resumed else own_folder(folder)
        self._model = model
        model.keep_delta_in(ScratchFolder(self.folder))
        self._model_name = model_name
        self._command = command or this_command()
        self._config = dict(config or {})
        self._samples = samples
        self._log_samples = log_samples
        self._adapter_rank = adapter_rank
        self._adapter: AdapterExport | None = None
        self._prompts = [*(sample.prompt for sample in samples), *prompts]
        self._texts = {"before": self._generate(model.segment.model)}
        """before and after training: a text for each of the prompts"""
        self._commit = commit()  # that of the code which runs, not of what is checked out when it ends
        self._started = time.perf_counter()

    def resume(self, server: RoundServer) -> None:
        """Let `server`, which is new, go on where the run that is resumed stopped; nothing where none is.

        Raises:
            ConfigError: a damaged checkpoint, or one of another version, model or other settings.
        """
        if self._resumed is None:
            return
        state = checkpoint.load(self._resumed, self._settings(server))
        server.load_state(state["server"])
        self._started -= state["seconds"]
        _log.info("resumed from %s: %d rounds are left", self._resumed, server.rounds_left)

    def after_round(self, server: RoundServer) -> None:
        """Write summary, report and checkpoint as they are so far."""
        self._attempt("the summary", lambda: self._write(self._summary(server, "running"), server))
        if self._keep_checkpoints:
            self._attempt("the checkpoint", lambda: self._save_checkpoint(server))

    def finish(self, server: RoundServer, error: BaseException | None = None) -> None:
        """Write all results of a run that ended, `error` being what ended it early; log its tables.

        What cannot be written is said, and costs nothing of the rest.
        """
        status: RunStatus = "failed" if error else "completed"
        reason = f"{type(error).__name__}: {error}" if error else ""
        self._attempt("the summary", lambda: self._write(self._summary(server, status, reason), server))
        if error is None or any(record.clients for record in server.history):
            self._attempt("the texts", lambda: self._generate_after(server))
            server.tail_rounds.merge_remaining()
            self._model.add_residuals()
            self._adapter = self._attempt("the adapter", self._export_adapter)
            self._attempt("the merged model", self._save_merged)
        summary = self._summary(server, status, reason)
        report = self._attempt("the summary", lambda: self._write(summary, server))
        self._attempt("the pictures", lambda: self._draw(summary, server))
        samples = self._sample_lines() if self._log_samples else []
        _log.info("%s", "\n".join(["", report or "", "", *samples]))
        _log.info("Results: %s", self.folder)

    def _save_checkpoint(self, server: RoundServer) -> None:
        state: State = {"server": server.state(), "seconds": time.perf_counter() - self._started}
        round_number = state["server"]["round"]
        checkpoint.save(self.folder, round_number, self._settings(server), state, self._keep_checkpoints)

    def _settings(self, server: RoundServer) -> dict[str, Any]:
        return {**self._decisive, **server.settings()}

    def _attempt(self, what: str, write: Callable[[], Result]) -> Result | None:
        try:
            return write()
        except (OSError, HSplitError, RuntimeError, ValueError, MemoryError) as error:
            _log.error("%s of this run could not be written to %s: %r", what, self.folder, error)
            return None

    def _summary(self, server: RoundServer, status: RunStatus, reason: str = "") -> RunSummary:
        """What is known of the run so far."""
        initial = server.initial_score.perplexity if server.initial_score else None
        settings = RunSettings(server.training, server.config.rule, self._model.num_blocks)
        slots = {when: score for when, texts in self._texts.items() if (score := self._slots(texts))}
        before, after = (self._texts.get(when, self._texts["before"]) for when in ("before", "after"))
        return RunSummary(
            initial_perplexity=initial,
            history=tuple(server.history),
            seed=server.training.seed,
            versions=versions(),
            commit=self._commit,
            command=self._command,
            wall_seconds=time.perf_counter() - self._started,
            config=self._config,
            adapter=self._adapter.to_dict() if self._adapter else None,
            health=diagnose(server.history, initial, settings, slots=slots),
            samples=tuple(
                {"prompt": sample.prompt, "reference": sample.reference, "before": then, "after": now}
                for sample, then, now in zip(self._samples, before, after, strict=False)
            ),
            slots=slots or None,
            status=status,
            reason=reason,
        )

    def _write(self, summary: RunSummary, server: RoundServer) -> str:
        """Write summary.json and report.txt; returns the report."""
        summary.save(self.folder / SUMMARY)
        report = "\n\n".join([run_report(summary), *_plan_sections(server)])
        (self.folder / "report.txt").write_text(report + "\n", encoding="utf-8")
        return report

    def _draw(self, summary: RunSummary, server: RoundServer) -> None:
        """Draw the run, its plans and the spectrum of its updates."""
        plot_run(summary, self.folder / "run.png")
        plot_spectrum(server.history, self.folder / "spectrum.png")
        planning = server.planning
        if planning is None or planning.in_force is None:
            return
        cuts = {client: planned.cut for client, planned in planning.in_force.clients.items()}
        source = "measured in this run" if planning.history.updates else "all equal: nothing measured"
        plot_importance(planning.profile, cuts, self.folder / "importance.png", source)
        plot_budgets(planning.in_force, planning.costs, planning.made_with, self.folder / "budgets.png")

    def _sample_lines(self) -> list[str]:
        before, after = (self._texts.get(when, self._texts["before"]) for when in ("before", "after"))
        lines = []
        for sample, then, now in zip(self._samples, before, after, strict=False):
            lines += [f"prompt  {sample.prompt}", f"before  {then}", f"after   {now}", ""]
        return lines

    def _export_adapter(self) -> AdapterExport:
        total = self._model.log.total
        return save_peft_adapter(
            {name: total.form(name) for name in total.names()},
            self._model_name,
            self.folder / "adapter",
            max_rank=self._adapter_rank,
            fan_in_fan_out=any(
                not isinstance(layer, torch.nn.Linear) for layer in self._model.segment.linear_modules().values()
            ),
        )

    def _save_merged(self) -> None:
        save_merged(self._model.segment.model, self._model.files.tokenizer(), self.folder / "merged_model")

    def _slots(self, texts: Sequence[str]) -> SlotScore | None:
        """Slots that the texts for the held-out prompts get right."""
        return score_slots(list(zip(self._prompts, texts, strict=True)))

    def _generate_after(self, server: RoundServer) -> None:
        self._texts["after"] = self._generate(server.tail_rounds.evaluated_model())

    def _generate(self, model: PreTrainedModel) -> list[str]:
        """Greedy texts for all prompts, those of the samples first."""
        if not self._prompts:
            return []
        return generate_texts(model, self._model.files.tokenizer(), self._prompts, max_new_tokens=MAX_NEW_TOKENS)


def run_rounds(server: RoundServer, output: RunOutput | None, play: Callable[[], Result]) -> Result:
    """All rounds of a run, as `play` plays them; whatever ends them, the tail is closed and what there is is written.

    Raises:
        RunFailedError: no client finished any round.
    """
    try:
        result = play()
        server.require_trained()
    except BaseException as error:
        server.close()
        if output:
            output.finish(server, error)
        raise
    server.close()
    if output:
        output.finish(server)
    return result


def own_folder(wanted: Path) -> Path:
    """`wanted`, created; the first free one of WANTED-2, WANTED-3, ... where a run's results are already.

    Raises:
        ConfigError: it cannot be created.
    """
    folder, number = wanted, 1
    try:
        while (folder / SUMMARY).exists() or checkpoint.saved(folder):
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Expected an output folder that can be created, found {error}. Choose another output-dir."
        ) from error
    if folder != wanted:
        _log.info("%s holds the results of another run; this one writes to %s", wanted, folder)
    return folder


def _plan_sections(server: RoundServer) -> list[str]:
    """The plan in force and how it came to be."""
    planning = server.planning
    if planning is None or planning.in_force is None:
        return []
    return [f"Plans\n{plan_history(server.history)}", f"Last plan\n{plan_table(planning.in_force)}"]
