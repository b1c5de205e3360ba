"""What a node keeps between Flower's messages: next to nothing in the context, the weight delta on its disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.common.serde import context_to_proto

from hsplit_flwr.common.cache_folder import CACHE_VARIABLE
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.client_state import ContextNotes, default_state_folder, delta_store
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import build_one_at_a_time, manager_of, play_round, random_batches
from tests.helpers.models import saved_llama

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
ROUNDS = 4
TRAINING = TrainingConfig(rounds=ROUNDS, local_steps=1, learning_rate=0.01, warmup_steps=0)
PLANS = {"0": ClientPlan(3, LoraSpec(16, 32.0)), "1": ClientPlan(1, LoraSpec(8, 16.0))}
DATA = {client: ClientData(random_batches(1, int(client)), random_batches(1, 10)) for client in PLANS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of whose weight delta a context holds less than one round."""
    return saved_llama(tmp_path_factory.mktemp("wide"), hidden_size=384, intermediate_size=1024)


@pytest.fixture
def strategy(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HSplitLoRAStrategy]:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")
    made = HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(model))),
        PLANS,
        TRAINING,
        tail_lora=LoraSpec(16, 32.0),
        config=StrategyConfig(wait_for_nodes_s=5.0, federated_evaluation=False),
        limits=BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0),
    )
    yield made
    made.close()


def context_bytes(node: LocalNode) -> int:
    """As Flower carries it."""
    size: int = context_to_proto(node.context).ByteSize()
    return size


def test_a_large_delta_stays_out_of_the_context_and_comes_in_increments(
    model: Path, strategy: HSplitLoRAStrategy
) -> None:
    nodes = [LocalNode(str(100 + int(c)), [c], model, DATA.__getitem__) for c in PLANS]
    manager = manager_of(*nodes)
    log, held = strategy.rounds.model.log, strategy.rounds.model.head_names(3)
    bytes_down = []
    for number in range(1, ROUNDS + 1):
        play_round(strategy, manager, number)
        record = {client.client_id: client for client in strategy.history[-1].clients}
        bytes_down.append(record["0"].bytes_down)
        assert all(context_bytes(node) < 4096 for node in nodes)
        stamp = ContextNotes(nodes[0].context).read("0")
        assert (stamp.version if stamp else 0) == number - 1
    whole, increment = log.since(None, held).nbytes, log.since(log.version - 1, held).nbytes
    assert whole > 3.9 * increment > 3.9 * MIB
    others = log.since(log.version - 1, held, own=OwnRound("0", ROUNDS)).nbytes
    assert others < 0.5 * increment  # it trained most of it itself
    gradients = bytes_down[0]  # there was no delta before round 1
    assert [found - gradients for found in bytes_down[1:]] == pytest.approx([others] * 3, abs=8192)


def node_context(**node_config: Any) -> Context:
    return Context(1, 1, node_config, RecordDict(), {})


def test_the_folder_is_the_nodes_own_or_flowers_or_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"h.0.q": (4, 4)}
    for name, home in (("own", tmp_path / "own"), ("flower", tmp_path / "flower" / "hsplit_flwr" / "clients")):
        monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower"))
        node = node_context(**({"state-dir": str(home)} if name == "own" else {}))
        with delta_store(node).open("run", "0", shapes) as replica:
            replica.version = 1
        assert len([path for path in home.iterdir() if path.is_dir()]) == 1
    monkeypatch.delenv("FLWR_HOME")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert default_state_folder() == tmp_path / "cache" / "clients"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"state-limit-gb": 0.0}, r"Expected state-limit-gb > 0, found 0\.0"),
        ({"state-limit-gb": "much"}, "Expected state-limit-gb as float, found 'much'"),
        ({"state-dir": 7}, "Expected state-dir as str, found 7"),
    ],
)
def test_a_wrong_node_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        delta_store(node_context(**config))
