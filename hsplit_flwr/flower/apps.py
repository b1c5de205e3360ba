"""Complete Flower server apps from a run config, on either face: what the apps in `simulations/` have in common."""

import logging
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.server import ServerAppComponents

from hsplit_flwr.common.device import describe_device
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.run_output import RunOutput
from hsplit_flwr.federation.sample_texts import Sample
from hsplit_flwr.flower.flower_log import log_as, log_through_flower
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.run_config import INDECISIVE, Settings
from hsplit_flwr.flower.server import server_components
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.probe import Link, own_budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.batch import Batch

_SERVER_LINK = {"uplink-mbps": 1000.0, "downlink-mbps": 1000.0, "latency-ms": 0.0}
"""of no consequence: plans count the clients' links"""
_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True, kw_only=True)
class ServerSide:
    """An app's server: what it trains, what it scores, and how it is called.

    Either face takes it: `legacy_components` for a ``server_fn``, `message_strategy` for ``@app.main()``.
    """

    app: str
    """the app's folder, for the command in the results"""
    run_config: Mapping[str, Any]
    """Flower's, recorded with the results"""
    run_id: int = 0
    """Flower's, by which `flwr list` names the run; for lines of the log"""
    settings: Settings
    """what `read_settings` made of it"""
    model_name: str
    """as a user names the base model"""
    files: ModelFiles
    """the base model"""
    eval_batches: Iterable[Batch] | None
    """server-side held-out batches; None: the server scores nothing"""
    samples: Sequence[Sample] = ()
    """prompts to show with the model's texts, before and after training"""
    prompts: Sequence[str] = ()
    """further held-out prompts, to count what the texts get right of them"""
    check_data: Callable[[], object] = lambda: None
    """raises a `ConfigError` where some client would find no data that fits: said once, before the first round"""


def legacy_components(side: ServerSide) -> ServerAppComponents:
    """What a ``server_fn`` returns.

    Raises:
        ConfigError: a setting that no client could train by.
    """
    model, plans, options = _prepared(side)
    strategy = HSplitLoRAStrategy(model, plans, side.settings.training, **options)
    return server_components(strategy, output=_output(side, model))


def message_strategy(side: ServerSide) -> HSplitLoRAMessageStrategy:
    """A strategy to ``start`` in ``@app.main()`` (raises as `legacy_components`)."""
    model, plans, options = _prepared(side)
    return HSplitLoRAMessageStrategy(model, plans, side.settings.training, output=_output(side, model), **options)


def _prepared(side: ServerSide) -> tuple[GlobalModel, Any, dict[str, Any]]:
    """Model, plans and the strategy's options."""
    settings = side.settings
    log_as(settings.log_format, side.run_id)
    log_through_flower()
    files = side.files.attending_by(settings.workload.attn_implementation)
    files = files.quantized_by(settings.workload.quantization)
    _check_rows(settings, files)
    side.check_data()
    if settings.server_threads:
        torch.set_num_threads(settings.server_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plans = settings.plans or _planning(settings, files, device)  # looks at free memory, so before the model
    model = GlobalModel(files, DTYPES[settings.workload.dtype], device)
    _log.info("the server computes on %s", describe_device(device))
    options = {
        "tail_lora": settings.tail_lora,
        "workload": settings.workload,
        "config": settings.strategy,
        "service": settings.service,
        "limits": settings.limits,
        "eval_batches": side.eval_batches,
        "metrics_bind": settings.metrics_bind,
    }
    return model, plans, options


def _check_rows(settings: Settings, files: ModelFiles) -> None:
    """Rows that no client could train on are said once, before the first round."""
    longest, width = files.max_positions, settings.workload.sequence_length
    if longest is not None and width > longest:
        raise ConfigError(
            f"Expected max-length of at most {longest}, the positions of {files.config.model_type!r}, found {width}. "
            "Lower max-length."
        )


def _output(side: ServerSide, model: GlobalModel) -> RunOutput:
    return RunOutput(
        model,
        side.model_name,
        side.settings.output_dir,
        command=flwr_command(side.app, {k: "" if k == "resume" else v for k, v in side.run_config.items()}),
        config=side.run_config,
        samples=side.samples,
        prompts=side.prompts,
        adapter_rank=side.settings.adapter_rank,
        keep_checkpoints=side.settings.keep_checkpoints,
        keep_best=side.settings.keep_best,
        trackers=side.settings.trackers,
        log_samples=side.settings.log_samples,
        resume=side.settings.resume,
        decisive={key: value for key, value in side.run_config.items() if key not in INDECISIVE},
    )


def _planning(settings: Settings, files: ModelFiles, device: str) -> AdaptivePlanning:
    server = settings.fleet.server if settings.fleet else own_budget(_SERVER_LINK, device, _no_link)
    return AdaptivePlanning(
        ModelCosts(files.config, settings.workload),
        server,
        settings.planner,
        settings.replan,
        lora_alpha=settings.lora.lora_alpha,
        use_rslora=settings.lora.use_rslora,
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
