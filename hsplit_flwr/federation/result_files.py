"""The files that a run's folder holds for people: its report, its pictures, its adapters."""

import logging
from pathlib import Path

import torch

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation import checkpoint
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.export import AdapterExport, save_peft_adapter
from hsplit_flwr.planning.plots import plot_budgets, plot_importance
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.reports.health.plots import plot_spectrum
from hsplit_flwr.reports.records import SUMMARY, RunSummary
from hsplit_flwr.reports.run_picture import plot_run
from hsplit_flwr.reports.run_tables import plan_history, run_report

REPORT = "report.txt"
_log = logging.getLogger("hsplit_flwr")


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


def write_tables(summary: RunSummary, server: RoundServer, folder: Path) -> str:
    """Write summary.json and report.txt; returns the report."""
    summary.save(folder / SUMMARY)
    report = "\n\n".join([run_report(summary), *_plan_sections(server)])
    (folder / REPORT).write_text(report + "\n", encoding="utf-8")
    return report


def draw(summary: RunSummary, server: RoundServer, folder: Path) -> None:
    """Draw the run, its plans and the spectrum of its updates."""
    plot_run(summary, folder / "run.png")
    plot_spectrum(server.history, folder / "spectrum.png")
    planning = server.planning
    if planning is None or planning.in_force is None:
        return
    cuts = {client: planned.cut for client, planned in planning.in_force.clients.items()}
    source = "measured in this run" if planning.history.updates else "all equal: nothing measured"
    plot_importance(planning.profile, cuts, folder / "importance.png", source)
    plot_budgets(planning.in_force, planning.costs, planning.made_with, folder / "budgets.png")


def export_adapter(
    delta: WeightDelta, model: GlobalModel, model_name: str, folder: Path, max_rank: int | None
) -> AdapterExport:
    """Write `delta` of `model` as one PEFT adapter (see `save_peft_adapter`), and what its base is quantised by."""
    exported = save_peft_adapter(
        {name: delta.form(name) for name in delta.names()},
        model_name,
        folder,
        max_rank=max_rank,
        fan_in_fan_out=any(not isinstance(layer, torch.nn.Linear) for layer in model.segment.linear_modules().values()),
    )
    if model.files.quantization:
        model.files.quantization.save(folder, model.segment.dtype)
    return exported


def _plan_sections(server: RoundServer) -> list[str]:
    """The plan in force and how it came to be."""
    planning = server.planning
    if planning is None or planning.in_force is None:
        return []
    return [f"Plans\n{plan_history(server.history)}", f"Last plan\n{plan_table(planning.in_force)}"]
