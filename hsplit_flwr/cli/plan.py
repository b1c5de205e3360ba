"""``hsplit-flwr plan``: what a federation would do, before anyone trains.

``hsplit-flwr plan --model NAME --profiles FILE`` plans cuts and ranks for the devices of a profile file
(`planning/budgets/fleet.py`), prints the plan as a table and, with ``--output``, writes ``plan.json``,
``importance.png`` and ``budgets.png``. The model's config suffices; no weights are read.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit_flwr.cli.parsing import NOBODY, Defaults, OneLineParser, fail, number, number_or_auto
from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.module_choice import from_words
from hsplit_flwr.lora.update_coding import UPDATE_CODECS, UpdateCoding
from hsplit_flwr.planning.exchange_choice import AUTO, CHOICES, describe
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.round_plan import Exchange
from hsplit_flwr.training.config import WIRE_CODECS, TrainingConfig
from hsplit_flwr.training.workload import ATTENTIONS, PLAIN, QUANTIZATIONS, Workload

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hsplit_flwr.planning.costs.model_costs import ModelCosts
    from hsplit_flwr.planning.round_plan import RoundPlan

UNIFORM = "uniform (nothing measured yet: every matrix counts the same)"


def declare(commands: "argparse._SubParsersAction[OneLineParser]") -> None:
    """Add the command and its options."""
    plan = commands.add_parser(
        "plan",
        help="who gets which blocks and ranks, what it costs, what limits it",
        description="Plan cuts and ranks for the devices of a profile file, from the model's config alone.",
        formatter_class=Defaults,
    )
    required = plan.add_argument_group("required")
    required.add_argument("--model", required=True, help="name on the hub, folder, .gguf file or path of a config.json")
    required.add_argument("--profiles", required=True, type=Path, metavar="FILE", help="TOML file of the devices")
    work = plan.add_argument_group("what a step is")
    number(work, "--batch-size", Workload.batch_size, "rows per client and step")
    number(work, "--sequence-length", Workload.sequence_length, "tokens per row, padding included")
    number(work, "--local-steps", TrainingConfig.local_steps, "steps per round")
    work.add_argument("--dtype", default=Workload.dtype, help="of the frozen weights: fp32, bf16 or fp16")
    formats = f"of the linear layers' frozen weights: {', '.join(QUANTIZATIONS)}"
    work.add_argument("--quantization", default=Workload.quantization, metavar="FORMAT", help=formats)
    sent = f"of a round's update to the clients: {', '.join(UPDATE_CODECS)}"
    work.add_argument("--update-codec", default=UpdateCoding.codec, metavar="CODEC", help=sent)
    number_or_auto(work, "--update-rank", UpdateCoding.rank, "largest rank of a matrix' update; 0: any")
    number(work, "--delta-rank", Workload.delta_rank, "largest rank of what is trained beside a quantised weight")
    codecs = f"{', '.join(WIRE_CODECS)}; auto: where a link decides, a smaller one"
    up, down = TrainingConfig.activation_codec, TrainingConfig.gradient_codec
    work.add_argument("--activation-codec", default=up, metavar="CODEC", help=f"of activations, up: {codecs}")
    work.add_argument("--gradient-codec", default=down, metavar="CODEC", help="of their gradients, down")
    number_or_auto(work, "--micro-batches", TrainingConfig.micro_batches, "parts that a batch travels in")
    in_flight = "parts whose gradients a head may be waiting for"
    number(work, "--micro-batches-in-flight", TrainingConfig.micro_batches_in_flight, in_flight)
    work.add_argument("--micro-steps", action="store_true", help="an optimizer step on each part")
    passes = "passes of the tail over the batches of a step"
    number_or_auto(work, "--tail-passes", TrainingConfig.tail_passes, passes)
    work.add_argument("--joint-steps", action="store_true", help="the tail steps on all clients at once")
    kept = "heads keep their adapters, and download what changes in them: twice their rank"
    work.add_argument("--keep-adapters", action="store_true", help=kept)
    cache = "the most that the server keeps of activations of heads that train nothing"
    number(work, "--activation-cache-mib", TrainingConfig.activation_cache_mib, cache)
    dropped = "share of an adapter's input that is dropped"
    work.add_argument("--lora-dropout", type=float, default=TrainingConfig.lora_dropout, metavar="P", help=dropped)
    work.add_argument("--autocast", default=TrainingConfig.autocast, help="of training passes: none or bf16")
    attention = f"of attention: {', '.join(ATTENTIONS)}"
    work.add_argument("--attn-implementation", default=Workload.attn_implementation, metavar="NAME", help=attention)
    work.add_argument("--gradient-checkpointing", action="store_true", help="heads recompute activations")
    measured = "first steps of a round that measure importance, too; 0: none"
    number(work, "--importance-steps", TrainingConfig.importance_steps, measured)
    number(work, "--importance-rows", TrainingConfig.importance_rows, "rows of a batch it is measured on; 0: all")
    choice = plan.add_argument_group("how to plan")
    ranks = ",".join(map(str, PlannerConfig.ranks))
    choice.add_argument("--ranks", type=_whole_numbers, default=ranks, help="candidate ranks, besides 0")
    number(choice, "--tail-rank", PlannerConfig.tail_rank, "mean rank of the tail's adapters")
    worth = "of a matrix that the tail trains, against one in a head; 0: as many blocks in heads as they afford; "
    worth += f"{AUTO}, the default: whatever makes most progress per second"
    choice.add_argument("--tail-worth", type=_worth, metavar="W", help=worth)
    number(choice, "--min-cut", PlannerConfig.min_cut, "blocks that every head holds at least")
    frozen = "heads may train nothing, if that makes more progress per second"
    choice.add_argument("--frozen-heads", action="store_true", help=frozen)
    targets = "endings of the linear layers that may get an adapter, or one regular expression"
    targets = f"{targets} (default: {PlannerConfig.target_modules})"
    choice.add_argument("--target-modules", nargs="+", metavar="NAME", help=targets)
    deadline = "the longest a round may take; inf: any (default: what makes most progress per second; with a "
    deadline += "--tail-worth: what the slowest client needs for the shallowest head)"
    choice.add_argument("--deadline-s", type=float, metavar="S", help=deadline)
    choice.add_argument("--importance", type=Path, metavar="FILE", help="summary.json of a run, or JSON by module")
    choice.add_argument("--exact", action="store_true", help="the exact optimum by integer programming; slow for many")
    number(choice, "--round", 1, "the round whose budgets hold")
    number(choice, "--rounds", TrainingConfig.rounds, "of the run, after which disks are looked at")
    number(choice, "--seed", TrainingConfig.seed, "of the budgets' fluctuations")
    plan.add_argument("--output", type=Path, metavar="DIR", help="also write plan.json, importance.png and budgets.png")
    plan.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Plan; returns 0, or `NOBODY` where every client is left out."""
    made = _plan(options)
    if made.clients:
        return 0
    client, reason = next(iter(made.left_out.items()))
    return fail(NOBODY, f"none of {len(made.left_out)} clients can take part; client {client}: {reason}")


def _worth(text: str) -> float | None:
    try:
        return None if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, found {text!r}") from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 2,4,8, found {text!r}") from None


def _plan(options: argparse.Namespace) -> "RoundPlan":
    # Imports here, not above: --help should not wait for torch, nor a misspelt profile file for transformers.
    from hsplit_flwr.planning.budgets.fleet import Fleet

    require_whole("--round", options.round, 1, key="--round")
    require_whole("--rounds", options.rounds, 1, key="--rounds")
    fleet = Fleet.from_toml(options.profiles, seed=options.seed)
    budgets = fleet.budgets(options.round)

    from hsplit_flwr.federation.run_output import KEEP_CHECKPOINTS
    from hsplit_flwr.models.equality import require_cuttable
    from hsplit_flwr.planning.costs.model_costs import ModelCosts
    from hsplit_flwr.planning.planner import plan, plan_exact
    from hsplit_flwr.planning.report import delta_table, deltas_of, plan_table

    workload, config = _workload(options), _planner_config(options)
    model_config = read_config(options.model)
    require_cuttable(model_config)  # as a run does
    costs = ModelCosts(model_config, workload)
    importance, source = _importance(options.importance, costs)
    made = (plan_exact if options.exact else plan)(costs, importance, budgets, fleet.server, config)

    costs = costs.under(made.exchange.of(workload))

    print(_heading(options, costs, config, source, made.exchange))
    print(f"\n{plan_table(made)}")
    deltas = deltas_of(made, costs, options.rounds, KEEP_CHECKPOINTS)
    after = f"after {options.rounds} rounds, float32, in files, and {KEEP_CHECKPOINTS} checkpoints"
    print(f"\nThe weight delta ({after}):\n\n{delta_table(deltas)}")
    if options.output:
        content = {
            "model": options.model,
            "profiles": str(options.profiles),
            "round": options.round,
            "seed": options.seed,
            "workload": asdict(costs.workload),
            "planner": {**_json_able(asdict(config)), "exact": options.exact},
            "importance": {"source": source, "by_module": dict(importance)},
            "budgets": {client: asdict(budget) for client, budget in budgets.items()},
            "server": asdict(fleet.server),
            "plan": asdict(made),
            "delta": {
                "rounds": options.rounds,
                **{name: {**asdict(found.disk), "memory_bytes": found.memory_bytes} for name, found in deltas.items()},
            },
        }
        cuts = {client: planned.cut for client, planned in made.clients.items()}
        written = _write(options.output, content)
        from hsplit_flwr.planning.plots import plot_budgets, plot_importance

        plot_importance(importance, cuts, written / "importance.png", source.split(" (")[0])
        plot_budgets(made, costs, budgets, written / "budgets.png")
        print(f"\nWritten to {written}: plan.json, importance.png, budgets.png")
    return made


def _workload(options: argparse.Namespace) -> Workload:
    names = (
        *("local_steps", "activation_codec", "gradient_codec", "importance_steps", "importance_rows", "micro_batches"),
        *("micro_batches_in_flight", "micro_steps", "joint_steps", "tail_passes", "keep_adapters"),
        *("activation_cache_mib", "lora_dropout", "autocast"),
    )
    stated = {name: value for name in names if (value := getattr(options, name)) != AUTO}
    training = TrainingConfig(**stated)
    return Workload.of(
        training,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        dtype=options.dtype,
        quantization=options.quantization,
        delta_rank=options.delta_rank,
        attn_implementation=options.attn_implementation,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def _planner_config(options: argparse.Namespace) -> PlannerConfig:
    return PlannerConfig(
        ranks=options.ranks,
        tail_rank=options.tail_rank,
        tail_worth=options.tail_worth,
        min_cut=options.min_cut,
        frozen_heads=options.frozen_heads,
        deadline_s=options.deadline_s,
        target_modules=from_words(options.target_modules or ()),
        update=_update(options),
        choose_update=options.update_rank == AUTO,
        choose=tuple(name for name in CHOICES if getattr(options, name) == AUTO),
    )


def _update(options: argparse.Namespace) -> UpdateCoding:
    rank = 0 if options.update_rank == AUTO else options.update_rank
    coding = UpdateCoding(options.update_codec, rank, options.delta_rank)
    return coding.merged() if options.quantization == PLAIN else coding


def _heading(
    options: argparse.Namespace, costs: "ModelCosts", config: PlannerConfig, source: str, exchange: Exchange
) -> str:
    work = costs.workload
    targets = f", on {' '.join(options.target_modules)}" if options.target_modules else ""
    unstated = "most progress per second" if config.tail_worth is None else "no longer than the slowest client needs"
    deadline = f"deadline {config.deadline_s:g} s" if config.deadline_s else unstated
    weights = work.dtype if work.quantization == PLAIN else f"{work.quantization}, computing in {work.dtype}"
    checkpointing = ", gradient checkpointing" if work.gradient_checkpointing else ""
    lines = {
        "model": f"{options.model}, {costs.num_blocks} blocks, {len(costs.matrices)} matrices in them, {weights}",
        "step": f"{work.batch_size} x {work.sequence_length} tokens per client, {describe(exchange)} on the wire"
        f"{checkpointing}; {work.local_steps} steps a round",
        "ranks": f"0, {', '.join(map(str, config.ranks))}; tail {config.tail_rank} on average{targets}; {deadline}",
        "planner": "exact (integer programming)" if options.exact else "greedy",
        "importance": source,
        "budgets": f"{options.profiles}, round {options.round}",
    }
    return "\n".join(f"{name + ':':11} {text}" for name, text in lines.items())


def read_config(name: str) -> "PretrainedConfig":
    """The config of a model of the hub, a folder, a ``.gguf`` file or a ``config.json``; no weights are read.

    Raises:
        ConfigError: none is found there, or an adapter lies beside it.
    """
    from transformers import AutoConfig

    from hsplit_flwr.models.files import refuse_adapter
    from hsplit_flwr.models.gguf_cache import unread_settings

    path = Path(name).expanduser()
    refuse_adapter(path)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path if path.exists() else name}
    try:
        if path.suffix == ".gguf":
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, **unread_settings(path)}
        config: PretrainedConfig = AutoConfig.from_pretrained(**where)
    # transformers and the hub's client raise OSError, ValueError, KeyError and more of their own for "no model there".
    except Exception as error:
        raise ConfigError(
            f"Expected a model's config under {name!r}, found none ({str(error).splitlines()[0]:.200}). Give a folder, "
            "a .gguf file, a config.json or a name on the hub."
        ) from error
    return config


def read_importance(path: Path) -> dict[str, float]:
    """Module name -> importance, from the last round of a run's ``summary.json`` or from a plain JSON object.

    Raises:
        ConfigError: neither of the two.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected importance as JSON in {path}, found: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("history"), list):
        rounds = (record for record in data["history"] if isinstance(record, dict))
        measured = [record["importance"] for record in rounds if record.get("importance")]
        if not measured:
            raise ConfigError(f"Expected a run that measured importance in {path}, found none. Set importance-steps=1.")
        data = measured[-1]
    if not isinstance(data, dict) or not data or not all(_is_importance(value) for value in data.values()):
        raise ConfigError(
            f"Expected numbers >= 0 by module name in {path}, found something else. "
            'Take the summary.json of a run, or write {"model.layers.0.mlp.up_proj": 1.5, ...}.'
        )
    return {str(name): float(value) for name, value in data.items()}


def _is_importance(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _importance(path: Path | None, costs: "ModelCosts") -> tuple[Mapping[str, float], str]:
    """Importance by module and where it comes from."""
    names = [matrix.name for matrix in costs.matrices]
    if path is None:
        return dict.fromkeys(names, 1.0), UNIFORM
    found = read_importance(path)
    if set(found) != set(names):
        unknown, missing = sorted(set(found) - set(names)), sorted(set(names) - set(found))
        raise ConfigError(
            f"Expected importance for the {len(names)} matrices of the model in {path}, found {len(unknown)} others "
            f"({', '.join(unknown[:2]) or 'none'}) and {len(missing)} missing ({', '.join(missing[:2]) or 'none'}). "
            "Take it from a run of the same model."
        )
    return {name: found[name] for name in names}, f"measured ({path})"


def _json_able(config: Mapping[str, Any]) -> dict[str, Any]:
    """What people typed of a config; JSON has no infinity, which is a deadline."""
    return {name: str(value) if value == float("inf") else value for name, value in config.items()}


def _write(folder: Path, content: Mapping[str, Any]) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Expected a folder to write into at {folder}, found: {error}.") from error
    return folder
