"""What a run leaves: tables, pictures, best adapter and checkpoint as it goes on; adapter and model at the end."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.common.provenance import command as this_command
from hsplit_flwr.common.provenance import commit, versions
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError, HSplitError
from hsplit_flwr.federation import checkpoint
from hsplit_flwr.federation.best_adapter import BestAdapters
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.result_files import draw, export_adapter, own_folder, write_tables
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.federation.sample_texts import Sample, SampleTexts
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.export import AdapterExport, save_merged
from hsplit_flwr.lora.places import ScratchFolder
from hsplit_flwr.reports.health.diagnosis import RunSettings, diagnose
from hsplit_flwr.reports.model_card import Kind, write_card
from hsplit_flwr.reports.records import RunStatus, RunSummary
from hsplit_flwr.reports.rounds_file import append_round, forget_rounds_after
from hsplit_flwr.reports.trackers import Trackers

_log = logging.getLogger("hsplit_flwr")
KEEP_CHECKPOINTS = 2
ADAPTER, MERGED = "adapter", "merged_model"
PROJECT = "hsplit_flwr"
"""what trackers file runs under"""
PICTURE_SHARE = 0.05
"""largest share of a run's time that pictures of a run under way may take"""
Result = TypeVar("Result")


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
        keep_best: write the adapter of the best round so far as soon as there is a better one (`best_adapter.py`).
        trackers: where else the run is followed, see `reports.trackers`.
        resume: the run to go on with, in its own folder: see `checkpoint.find`; empty: begin one.
        decisive: what of `config` decides the results: a run that resumes this one must have it alike.

    Raises:
        ConfigError: the folder cannot be created, there is no run to resume, `adapter_rank` is no rank, or a tracker is
            not there.
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
        keep_best: bool = True,
        trackers: Sequence[str] = (),
        resume: str = "",
        decisive: Mapping[str, Any] | None = None,
    ) -> None:
        if adapter_rank is not None and adapter_rank < 1:
            raise ConfigError(f"Expected adapter-rank >= 1, or 0 for as much as exactness takes, found {adapter_rank}.")
        require_whole("keep_checkpoints", keep_checkpoints, 0)
        self._resumed = checkpoint.find(resume, folder) if resume else None
        self._keep_checkpoints = keep_checkpoints
        self._keep_best = keep_best
        self._decisive = dict(decisive or {})
        self.folder = checkpoint.run_folder(self._resumed) if self._resumed else own_folder(folder)
        self._model = model
        model.keep_delta_in(ScratchFolder(self.folder))
        self._model_name = model_name
        self._command = command or this_command()
        self._config = dict(config or {})
        self._trackers = Trackers(trackers, self.folder, PROJECT, self._config)
        self._log_samples = log_samples
        self._adapter_rank = adapter_rank
        self._adapter: AdapterExport | None = None
        self._texts = SampleTexts(model.files, samples, prompts)
        self._texts.write("before", model.segment.model)
        self._best = BestAdapters(self.folder)
        self._commit = commit()  # that of the code which runs, not of what is checked out when it ends
        self._started = time.perf_counter()
        self._next_pictures = self._started

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
        self._attempt("the rounds so far", lambda: forget_rounds_after(self.folder, server.resumed_after))
        self._attempt("the best adapters alone", lambda: self._prune_best(server))
        best = self._best.named(server.history)
        if self._keep_best and best and not best.adapter:
            _log.warning("round %d is the best so far, and its adapter is not in %s", best.round, self.folder)
        _log.info("resumed from %s: %d rounds are left", self._resumed, server.rounds_left)

    def after_round(self, server: RoundServer) -> None:
        """Write the round, best adapter, summary, report, checkpoint and (now and then) pictures as they are so far."""
        self._attempt("the round", lambda: append_round(self.folder, server.history))
        if server.history:
            self._trackers.log_round(server.history[-1], server.training.local_steps)
        if self._keep_best:
            self._attempt("the best adapter", lambda: self._save_best(server))
        summary = self._summary(server, "running")
        self._attempt("the summary", lambda: write_tables(summary, server, self.folder))
        if self._keep_checkpoints:
            self._attempt("the checkpoint", lambda: self._save_checkpoint(server))
        if self._keep_best:
            self._attempt("the best adapters alone", lambda: self._prune_best(server))
        if time.perf_counter() >= self._next_pictures:
            self._draw(summary, server)

    def finish(self, server: RoundServer, error: BaseException | None = None) -> None:
        """Write all results of a run that ended, `error` being what broke it off; log its tables.

        What cannot be written is said, and costs nothing of the rest.
        """
        status: RunStatus = "failed" if error else "completed"
        reason = f"{type(error).__name__}: {error}" if error else server.enough
        self._attempt("the summary", lambda: write_tables(self._summary(server, status, reason), server, self.folder))
        if error is None or any(record.clients for record in server.history):
            self._attempt("the texts", lambda: self._texts.write("after", server.tail_rounds.evaluated_model()))
            server.tail_rounds.merge_remaining()
            self._model.add_residuals()
            self._adapter = self._attempt("the adapter", self._export_last)
            self._attempt("the merged model", self._save_merged)
        summary = self._summary(server, status, reason)
        report = self._attempt("the summary", lambda: write_tables(summary, server, self.folder))
        self._attempt("the model cards", lambda: self._write_cards(summary))
        self._draw(summary, server)
        self._trackers.close(failed=error is not None)
        samples = self._texts.lines() if self._log_samples else []
        _log.info("%s", "\n".join(["", report or "", "", *samples]))
        _log.info("Results: %s", self.folder)

    def _draw(self, summary: RunSummary, server: RoundServer) -> None:
        begun = time.perf_counter()
        self._attempt("the pictures", lambda: draw(summary, server, self.folder))
        drawn = time.perf_counter()
        self._next_pictures = drawn + (drawn - begun) * (1 / PICTURE_SHARE - 1)

    def _save_checkpoint(self, server: RoundServer) -> None:
        state: State = {"server": server.state(), "seconds": time.perf_counter() - self._started}
        round_number = state["server"]["round"]
        checkpoint.save(self.folder, round_number, self._settings(server), state, self._keep_checkpoints)

    def _save_best(self, server: RoundServer) -> None:
        tail_rounds = server.tail_rounds
        self._best.keep(server.history, lambda folder: self._export(tail_rounds.evaluated_delta(), folder))

    def _prune_best(self, server: RoundServer) -> None:
        self._best.prune(server.history, checkpoint.rounds_of(self.folder))

    def _export_last(self) -> AdapterExport:
        return self._export(self._model.log.total, self.folder / ADAPTER)

    def _export(self, delta: WeightDelta, folder: Path) -> AdapterExport:
        return export_adapter(delta, self._model, self._model_name, folder, self._adapter_rank)

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
        slots = self._texts.slots()
        return RunSummary(
            initial_perplexity=initial,
            history=tuple(server.history),
            seed=server.training.seed,
            versions=versions(),
            commit=self._commit,
            command=self._command,
            wall_seconds=time.perf_counter() - self._started,
            config=self._config,
            adapter={**self._adapter.to_dict(), "delta_error": self._model.delta_error} if self._adapter else None,
            health=diagnose(server.history, initial, settings, slots=slots or {}),
            samples=self._texts.shown(),
            slots=slots,
            status=status,
            reason=reason,
            best=self._best.named(server.history),
        )

    def _write_cards(self, summary: RunSummary) -> None:
        kinds: dict[str, Kind] = {ADAPTER: "adapter", MERGED: "merged model"}
        for name, kind in kinds.items():
            if (self.folder / name).is_dir():
                write_card(self.folder / name, kind, self._model_name, summary, self._model.files.quantization)

    def _save_merged(self) -> None:
        if self._model.files.quantization:
            _log.info("no merged model is written: its weights would have to be quantised again. Load the adapter.")
            return
        save_merged(self._model.segment.model, self._model.files.tokenizer(), self.folder / MERGED)


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
