"""A complete Flower ServerApp from a run config: what the apps in `simulations/` have in common."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.server import ServerAppComponents

from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.run_output import RunOutput, Sample
from hsplit_flwr.flower.run_config import Settings
from hsplit_flwr.flower.server import log_progress, server_components
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.probe import Link, own_budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.loss import Batch

_SERVER_LINK = {"uplink-mbps": 1000.0, "downlink-mbps": 1000.0, "latency-ms": 0.0}
"""of no consequence: plans count the clients' links"""


def server_app_components(
    app: str,
    run_config: Mapping[str, Any],
    settings: Settings,
    model_name: str,
    files: ModelFiles,
    eval_batches: Iterable[Batch],
    samples: Sequence[Sample] = (),
) -> ServerAppComponents:
    """Model, strategy and results of a run.

    Args:
        app: the app's folder, for the command in the results.
        run_config: Flower's run config, recorded with the results.
        settings: what `read_settings` made of it.
        model_name: how a user names the base model.
        files: the base model.
        eval_batches: server-side held-out batches.
        samples: prompts to generate from before and after.
    """
    if settings.server_threads:
        torch.set_num_threads(settings.server_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plans = settings.plans or _planning(settings, files, device)  # looks at free memory, so before the model
    model = GlobalModel(files, DTYPES[settings.workload.dtype], device)
    output = RunOutput(
        model,
        model_name,
        settings.output_dir,
        command=flwr_command(app, run_config),
        config=run_config,
        samples=samples,
        adapter_rank=settings.adapter_rank,
    )
    strategy = HSplitLoRAStrategy(
        model,
        plans,
        settings.training,
        tail_lora=settings.tail_lora,
        workload=settings.workload,
        config=settings.strategy,
        service=settings.service,
        limits=settings.limits,
        eval_batches=eval_batches,
        on_step=log_progress(settings.training),
    )
    return server_components(strategy, on_end=output)


def _planning(settings: Settings, files: ModelFiles, device: str) -> AdaptivePlanning:
    server = settings.fleet.server if settings.fleet else own_budget(_SERVER_LINK, device, _no_link)
    return AdaptivePlanning(
        ModelCosts(files.config, settings.workload),
        server,
        settings.planner,
        settings.replan,
        lora_alpha=settings.lora_alpha,
    )


def _no_link() -> Link:
    raise AssertionError("the server's link is stated")


def flwr_command(app: str, run_config: Mapping[str, Any]) -> str:
    """The ``flwr run`` line that repeats a run, with every value of its run config."""
    pairs = " ".join(f"{key}={_toml(value)}" for key, value in sorted(run_config.items()))
    return f"flwr run {app} --stream --run-config {shlex.quote(pairs)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # Flower splits at either quote, TOML takes ' literally
        return f"'{value}'" if '"' in value or "\\" in value else f'"{value}"'
    return str(value)
