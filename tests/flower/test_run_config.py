"""Flower's flat run config -> settings, and back to the command that repeats a run."""

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.apps import flwr_command
from hsplit_flwr.flower.client_settings import RunConfig, count_clients, get, hosted_clients, integers, read_tls
from hsplit_flwr.flower.finetune.new_app import FINETUNE, KEYS, package_of
from hsplit_flwr.flower.run_config import read_settings
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import ReplanConfig
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

SIMULATIONS = Path(__file__).parents[2] / "simulations"
APPS = ["quickstart", "e2e-nlg", "finetune"]
PROFILED = ["quickstart", "e2e-nlg"]
"""those that come with a profile file"""
HERE = Path(__file__).parent
_, RUN_CONFIG = KEYS
EXPERIMENTS = sorted((SIMULATIONS / "e2e-nlg" / "experiments").glob("*.toml"))
SMALLEST = {"cuts": "1,3", "ranks": "2,4"}


def folder_of(app: str) -> Path:
    """Where the app's code is."""
    return SIMULATIONS / app / package_of(app)


def app_config(app: str) -> dict[str, Any]:
    text = (SIMULATIONS / app / "pyproject.toml").read_text()
    config: dict[str, Any] = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    return config


# --- settings ---


def test_what_is_absent_takes_the_defaults_of_the_dataclasses() -> None:
    settings = read_settings(SMALLEST, HERE)
    assert settings.training == TrainingConfig()
    assert settings.strategy == StrategyConfig()
    assert settings.service == ServiceConfig()
    assert settings.limits == BarrierLimits()
    assert settings.tail_lora == LoraSpec(PlannerConfig.tail_rank)
    assert settings.plans == {"0": ClientPlan(1, LoraSpec(2, 16.0)), "1": ClientPlan(3, LoraSpec(4, 16.0))}
    assert (settings.workload, settings.server_threads, settings.adapter_rank) == (
        Workload(sequence_length=96),
        0,
        None,
    )
    assert settings.fleet is None


def test_heads_may_train_nothing_if_people_say_so() -> None:
    assert not read_settings(SMALLEST, HERE).planner.frozen_heads
    assert read_settings({**SMALLEST, "frozen-heads": True}, HERE).planner.frozen_heads
    with pytest.raises(ConfigError, match=r"auto where frozen-heads = true.*found 0.0 \(run config: tail-worth\)"):
        read_settings({**SMALLEST, "frozen-heads": True, "tail-worth": 0.0}, HERE)


def test_every_key_arrives() -> None:
    settings = read_settings(
        {
            **SMALLEST,
            "lora-alpha": 4.0,
            "target-modules": "q_proj v_proj",
            "tail-rank": 6,
            "tail-worth": 0.5,
            "min-cut": 2,
            "aggregation": "svd",
            "min-nodes": 3,
            "fraction-clients": 0.5,
            "federated-evaluation": False,
            "round-limit-s": 90,
            "max-share": 0.5,
            "max-update-norm": 7,
            "max-update-ratio": 3,
            "update-excess": "refuse",
            "update-codec": "bf16",
            "update-rank": 8,
            "tail-bind": "0.0.0.0:7000",
            "tail-address": "tail.example.org",
            "tail-certificate": "tls/chain.pem",
            "tail-private-key": "tls/key.pem",
            "tail-client-root-certificates": "tls/ca.pem",
            "max-frame-mib": 3,
            "start-gate-s": 1,
            "straggler-limit-s": 2.5,
            "reconnect-grace-s": 4.5,
            "rounds": 7,
            "local-steps": 8,
            "learning-rate": 1,
            "warmup-steps": 0,
            "schedule": "cosine",
            "weight-decay": 0.1,
            "max-grad-norm": 0.0,
            "activation-codec": "bf16",
            "gradient-codec": "int8",
            "seed": 9,
            "dtype": "bf16",
            "server-threads": 2,
            "output-dir": "somewhere",
            "adapter-rank": 16,
            "log-samples": True,
            "batch-size": 3,
            "max-length": 50,
            "gradient-checkpointing": True,
            "candidate-ranks": "1,3",
            "deadline-s": 12,
            "drift-threshold": 0.5,
            "budget-tolerance": 0.3,
            "importance-steps": 2,
            "importance-rows": 0,
            "joint-steps": True,
            "tail-passes": 3,
            "micro-batches": 4,
            "micro-batches-in-flight": 3,
            "micro-steps": True,
            "activation-cache-mib": 40,
            "keep-adapters": True,
        },
        HERE,
    )
    parts: dict[str, Any] = {"micro_batches": 4, "micro_batches_in_flight": 3, "micro_steps": True}
    parts["activation_cache_mib"] = 40
    expected = TrainingConfig(7, 8, 1.0, 0, "cosine", 0.1, 0.0, "bf16", "int8", 9, 2, 0, True, 3, **parts)
    expected = replace(expected, keep_adapters=True)
    assert settings.training == expected
    assert settings.workload == Workload(
        *(3, 50, 8, "bf16", "bf16", "int8", True),
        importance_steps=2,
        importance_rows=0,
        keep_adapters=True,
        joint_steps=True,
        tail_passes=3,
        **parts,
    )
    coding = UpdateCoding("bf16", 8)
    assert settings.planner == PlannerConfig((1, 3), 6, 0.5, 12.0, ("q_proj", "v_proj"), coding, min_cut=2)
    assert settings.replan == ReplanConfig(0.5, 0.3)
    assert settings.lora.lora_alpha == 4.0
    assert settings.plans
    assert settings.plans["1"] == ClientPlan(3, LoraSpec(4, 4.0, ("q_proj", "v_proj")))
    assert settings.tail_lora == LoraSpec(6, 4.0, ("q_proj", "v_proj"))
    assert settings.strategy == StrategyConfig(
        "svd", 3, 0.5, False, 90.0, max_share=0.5, max_update_norm=7.0, max_update_ratio=3.0, update_excess="refuse",
        update_codec="bf16", update_rank=8,
    )  # fmt: skip
    assert settings.service == ServiceConfig(
        "0.0.0.0:7000",
        "tail.example.org",
        3 * 1024 * 1024,
        certificate=Path("tls/chain.pem"),
        private_key=Path("tls/key.pem"),
        client_root_certificates=Path("tls/ca.pem"),
    )
    assert settings.limits == BarrierLimits(start_gate_s=1.0, straggler_limit_s=2.5, reconnect_grace_s=4.5)
    assert (settings.server_threads, settings.adapter_rank, settings.log_samples) == (2, 16, True)
    assert settings.output_dir == Path.cwd() / "somewhere"  # where Flower puts the app must not matter


def test_a_tail_without_adapters() -> None:
    tail = read_settings({**SMALLEST, "tail-rank": 0}, HERE).tail_lora
    assert tail.targets(["h.1.q", "h.1.v"]) == []


@pytest.mark.parametrize("app", PROFILED)
def test_the_apps_configs_are_settings(app: str) -> None:
    settings = read_settings(app_config(app), folder_of(app))
    assert settings.plans is None
    assert settings.fleet
    assert settings.fleet.client_ids == ("0", "1", "2", "3", "4")
    assert len({budget.memory_bytes for budget in settings.fleet.budgets(1).values()}) == 5


def test_clients_are_counted_by_cuts_profiles_or_nodes() -> None:
    folder = SIMULATIONS / "quickstart" / "quickstart"
    assert count_clients(SMALLEST, {"num-partitions": 7}, HERE) == 2
    assert count_clients({"profiles": "devices.toml"}, {"num-partitions": 7}, folder) == 5
    assert count_clients({}, {"num-partitions": 7}, HERE) == 7


def test_configured_cuts_put_profiles_out_of_force() -> None:
    settings = read_settings({**SMALLEST, "profiles": "no-such-file.toml"}, HERE)
    assert settings.fleet is None
    with pytest.raises(ConfigError, match=r"no-such-file\.toml"):
        read_settings({"profiles": "no-such-file.toml"}, HERE)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: str(path.stem))
def test_an_experiment_changes_only_keys_that_the_app_has(experiment: Path) -> None:
    config, changes = app_config("e2e-nlg"), tomllib.loads(experiment.read_text())
    assert changes.keys() <= config.keys()
    read_settings({**config, **changes}, folder_of("e2e-nlg"))


def test_what_is_auto_is_left_to_the_plan() -> None:
    keys: RunConfig = {"activation-codec": "auto", "micro-batches": "auto", "tail-passes": 2, "update-rank": "auto"}
    settings = read_settings(keys, HERE)
    assert settings.planner.choose_update
    assert settings.strategy.update_coding.exact  # until a plan has chosen
    with pytest.raises(ConfigError, match="Expected update-rank as a value where cuts are configured, found auto"):
        read_settings({"update-rank": "auto", "cuts": "1,2", "ranks": "2,4"}, HERE)
    assert settings.planner.choose == ("activation_codec", "micro_batches")
    assert settings.training == TrainingConfig(tail_passes=2)
    with pytest.raises(ConfigError, match="Expected activation-codec as a value where cuts are configured, found auto"):
        read_settings({**keys, "cuts": "1,2", "ranks": "4,4"}, HERE)
    with pytest.raises(ConfigError, match="Expected learning-rate as float, found 'auto'"):
        read_settings({"learning-rate": "auto"}, HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": "5"}, r"Expected rounds as int, found '5'\. Example: rounds=5\."),
        ({"rounds": 5.0}, r"Expected rounds as int, found 5\.0"),
        ({"rounds": True}, "Expected rounds as int, found True"),
        ({"rounds": 0}, "Expected rounds as a whole number >= 1, found 0"),
        ({"learning-rate": "fast"}, "Expected learning-rate as float, found 'fast'"),
        ({"learning-rate": True}, "Expected learning-rate as float, found True"),
        ({"federated-evaluation": 1}, "Expected federated-evaluation as bool, found 1"),
        ({"schedule": "step"}, "Expected schedule as one of"),
        ({"activation-codec": "int3"}, "Expected activation_codec as one of"),
        ({"gradient-codec": "int3"}, "Expected gradient_codec as one of .*run config: gradient-codec"),
        ({"aggregation": "mean"}, "Expected an aggregation rule among .*found 'mean'"),
        ({"fraction-clients": 0.0}, "Expected 0 < fraction_clients <= 1, found 0.0"),
        ({"max-share": 0.0}, "Expected max_share > 0 and at most 1, found 0.0 .run config: max-share"),
        ({"update-excess": "x"}, "Expected update_excess as one of .*run config: update-excess"),
        ({"update-codec": "int8"}, "Expected update_codec as one of .*run config: update-codec"),
        ({"update-rank": -1}, "Expected update_rank .*run config: update-rank"),
        ({"start-gate-s": 0}, "Expected start_gate_s > 0 s, found 0.0"),
        ({"exchange": "post"}, r"Expected exchange as one of \('grpc', 'messages'\), found 'post'"),
        ({"message-limit-s": 0}, "Expected message_limit_s > 0 s, found 0.0 .run config: message-limit-s"),
        ({"cuts": "1,x"}, "Expected cuts as integers with commas, such as '2,4,6', found '1,x'"),
        ({"cuts": "1,2,3"}, r"cuts and ranks for the same clients, found \['0', '1', '2'\] and \['0', '1'\]"),
        ({"cuts": "0,2"}, "Expected a cut >= 1"),
        ({"ranks": "-1,2"}, "Expected LoRA ranks to be integers >= 0"),
    ],
)
def test_bad_values_name_what_is_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings({**SMALLEST, **change}, HERE)


@pytest.mark.parametrize(
    "key",
    [
        *("tail-address", "tail-certificate", "tail-private-key", "tail-root-certificates"),
        *("tail-client-root-certificates", "tail-client-certificate", "tail-client-private-key"),
    ],
)
def test_an_exchange_over_messages_has_no_connection_to_set(key: str) -> None:
    """Who sets TLS files would believe that they protect something."""
    settings = read_settings({**SMALLEST, "exchange": "messages", "max-frame-mib": 3, "message-limit-s": 7}, HERE)
    assert settings.service == ServiceConfig(bind="messages://", max_frame_bytes=3 << 20)
    assert settings.strategy.message_limit_s == 7.0
    with pytest.raises(ConfigError, match=rf'Expected no {key} with exchange = "messages", found \'x\''):
        read_settings({**SMALLEST, "exchange": "messages", key: "x"}, HERE)


def test_a_missing_table_is_named() -> None:
    with pytest.raises(ConfigError, match="Expected ranks as integers with commas"):
        read_settings({"cuts": "1,2"}, HERE)


# --- values ---


def test_get_takes_an_integer_for_a_float_and_nothing_else() -> None:
    assert get({}, "x", 0.5) == 0.5
    found = get({"x": 2}, "x", 0.5)
    assert (type(found), found) == (float, 2.0)
    with pytest.raises(ConfigError, match="Expected x as str, found 2"):
        get({"x": 2}, "x", "a")


def test_integers_are_numbered_in_order() -> None:
    assert integers({"cuts": "4, 2,6"}, "cuts") == {"0": 4, "1": 2, "2": 6}
    assert integers({"cuts": 3}, "cuts") == {"0": 3}  # TOML's 3 for one client


# --- who hosts whom ---


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8])
def test_every_client_has_one_node(nodes: int) -> None:
    hosted = [hosted_clients({"partition-id": node, "num-partitions": nodes}, 5) for node in range(nodes)]
    assert sorted(client for clients in hosted for client in clients) == ["0", "1", "2", "3", "4"]
    assert max(map(len, hosted)) - min(map(len, hosted)) <= 1


def test_a_lone_node_hosts_all() -> None:
    assert hosted_clients({}, 3) == ["0", "1", "2"]


@pytest.mark.parametrize(("node", "nodes"), [(2, 2), (-1, 2), (0, 0), (1, 1)])
def test_a_node_that_cannot_be_is_refused(node: int, nodes: int) -> None:
    with pytest.raises(ConfigError, match=rf"found partition-id={node} and num-partitions={nodes}\."):
        hosted_clients({"partition-id": node, "num-partitions": nodes}, 5)


# --- the command ---


@pytest.mark.parametrize("app", APPS)
def test_the_command_repeats_the_apps_config(app: str) -> None:
    assert_repeats(app_config(app))


def test_the_command_repeats_awkward_values() -> None:
    assert_repeats(
        {"a": True, "b": 1e-05, "c": "", "d": "two words", "e": 'say "hi"', "f": r"C:\new\run", "g": "it's", "h": -3}
    )


def assert_repeats(config: dict[str, Any]) -> None:
    words = shlex.split(flwr_command("simulations/x", config))
    assert words[:5] == ["flwr", "run", "simulations/x", "--stream", "--run-config"]
    assert len(words) == 6
    assert parse_config_args([words[5]]) == config


class Recorded(dict[str, Any]):
    """A run config that notes which keys it was asked for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def keys_in_code(app: str) -> set[str]:
    """The keys that an app's own code reads; that of `finetune` is in the library."""
    code = FINETUNE if app == "finetune" else folder_of(app)
    literal = re.compile(r'get\(\s*(?:context\.)?run_config,\s*"([a-z-]+)"')
    return {key for path in code.rglob("*.py") for key in literal.findall(path.read_text())}


def test_what_gets_an_adapter_and_how_it_scales_is_for_heads_tail_and_planner_alike() -> None:
    chosen: dict[str, Any] = {"exclude-modules": "k_proj 0.q_proj", "layers-to-transform": "0,2,3", "use-rslora": True}
    settings = read_settings({**SMALLEST, **chosen, "tail-rank": 3}, HERE)
    assert settings.plans is not None
    for lora, rank in ((settings.plans["0"].lora, 2), (settings.plans["1"].lora, 4), (settings.tail_lora, 3)):
        assert lora == LoraSpec(
            rank,
            16.0,
            exclude_modules=("k_proj", "0.q_proj"),
            layers_to_transform=(0, 2, 3),
            use_rslora=True,
        )
    names = [f"h.{block}.{leaf}" for block in range(4) for leaf in ("k_proj", "q_proj", "up")]
    assert settings.planner.targets(names) == ["h.0.up", "h.2.q_proj", "h.2.up", "h.3.q_proj", "h.3.up"]
    with pytest.raises(ConfigError, match="layers-to-transform as integers"):
        read_settings({**SMALLEST, "layers-to-transform": "all"}, HERE)


@pytest.mark.parametrize("app", APPS)
def test_every_key_that_is_read_can_be_set(app: str) -> None:
    """Flower refuses keys that the app's pyproject does not list, without naming them: 18 could not be set."""
    config = Recorded(app_config(app))
    folder = folder_of(app)
    read_settings(config, folder)
    read_settings(Recorded(SMALLEST), folder)
    count_clients(config, {}, folder)
    assert len(config.asked) > 40
    assert (config.asked | keys_in_code(app)) - app_config(app).keys() == set()


@pytest.mark.parametrize("app", APPS)
def test_every_key_that_can_be_set_is_read(app: str) -> None:
    config = Recorded(app_config(app))
    folder = folder_of(app)
    read_settings(config, folder)
    read_settings(unplanned := Recorded({**app_config(app), **SMALLEST}), folder)
    read_tls(config, {})  # as a client does
    assert app_config(app).keys() - config.asked - unplanned.asked - keys_in_code(app) == set()


def test_the_librarys_table_is_what_the_library_reads() -> None:
    """Apps that ``hsplit-flwr new`` writes take their keys from it, so what it lacks could be set in none of them."""
    table = read_toml(RUN_CONFIG, "run-config keys")
    config, unplanned = Recorded(table), Recorded({**table, **SMALLEST})
    for asked in (config, unplanned):
        read_settings(asked, HERE)
    read_tls(config, {})
    count_clients(config, {}, HERE)
    assert config.asked | unplanned.asked == table.keys()


@pytest.mark.parametrize("rank", [-1, -7])
def test_an_adapter_rank_below_zero_is_refused_at_start(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"Expected adapter-rank >= 0 .*found {rank}"):
        read_settings({**SMALLEST, "adapter-rank": rank}, HERE)
