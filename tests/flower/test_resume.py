"""A run that broke off goes on to what it would have been: bit by bit, on both faces, wherever it broke off."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor

from hsplit_flwr.errors import ConfigError, RunFailedError
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.federation.run_output import RunOutput
from hsplit_flwr.federation.sample_texts import Sample
from hsplit_flwr.flower.apps import ServerSide, legacy_components, message_strategy
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.client_state import ContextNotes, delta_store
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.message_client import client_app
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.flower.run_config import read_settings
from hsplit_flwr.flower.server import HSplitLoRAServer, server_components
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.delta_update import DeltaReplica
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import linear_shapes
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training import tail_step
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.loss import token_losses
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import Node, build_one_at_a_time, random_batches, weights_of
from tests.helpers.grid import ThreadGrid

pytestmark = pytest.mark.timeout(180)

TRAINING = TrainingConfig(rounds=3, local_steps=2, learning_rate=0.02, warmup_steps=2, schedule="cosine")
CLIENTS = ("0", "1", "2")
PLANS = {"0": ClientPlan(1, LoraSpec(1, 2.0)), "1": ClientPlan(2, LoraSpec(2, 3.0)), "2": ClientPlan(3, LoraSpec(4))}
BATCHES = {c: random_batches(6, seed=int(c), rows=2 + int(c)) for c in CLIENTS}


def data_of(client: str) -> ClientData:
    """Other batches in every round: who starts at a wrong step trains on others."""
    return ClientData(lambda first_step: BATCHES[client][first_step:], random_batches(1, 10 + int(client)))


EVALUATION = random_batches(2, seed=20)
WORKLOAD = Workload(batch_size=4, sequence_length=10, local_steps=2)
LIMITS = BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0)
MODEL = str(tiny_checkpoint())
FACES = pytest.mark.parametrize("face", ["legacy", "messages"])


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def budgets(client: str, round_number: int) -> Budget:
    """Client 2 loses half of its memory in round 3: whoever resumes must ask for that round."""
    memory = (40, 80, 160)[int(client)] * 1_000_000 // (2 if client == "2" and round_number >= 3 else 1)
    return Budget(
        memory_bytes=memory, flops_per_s=1e9, uplink_bytes_per_s=1e6, downlink_bytes_per_s=2e6, latency_s=0.01
    )


def planning(*, frozen_heads: bool = False) -> AdaptivePlanning:
    server = Budget(
        memory_bytes=8 << 30, flops_per_s=1e12, uplink_bytes_per_s=1e8, downlink_bytes_per_s=1e8, latency_s=0.0
    )
    # choices that a resumed run must know
    planner = PlannerConfig(choose=("gradient_codec",), choose_update=True, frozen_heads=frozen_heads)
    return AdaptivePlanning(costs(), server, planner)


@cache
def costs() -> ModelCosts:
    """Costs under every workload that some plan tries: they depend on nothing else, and take longer than the plans."""
    return ModelCosts(ModelFiles.resolve(MODEL).config, WORKLOAD)


class Federation:
    """The clients of a run, which outlive its server, behind either face."""

    def __init__(
        self, face: str, planned: bool, quantization: str = "none", *, frozen_heads: bool = False, **config: Any
    ) -> None:
        self.face = face
        self.frozen_heads = frozen_heads
        self.quantization = quantization
        self.config = config
        self.planned = planned
        hosted = budgets if planned else None
        self.nodes = [LocalNode(c, [c], MODEL, data_of, quantization=quantization, budgets=hosted) for c in CLIENTS]
        self.grid = ThreadGrid({100 + int(c): self._app(c) for c in CLIENTS}) if face == "messages" else None

    def _app(self, client: str) -> ClientApp:
        def node(context: Context) -> ClientNode:
            hosted = budgets if self.planned else None
            return ClientNode(
                MODEL, data_of, context, client_ids=[client], quantization=self.quantization, budgets=hosted
            )

        return client_app(node)

    def run(
        self,
        folder: Path,
        resume: str = "",
        trap: Callable[[RoundServer], None] = lambda rounds: None,
        training: TrainingConfig = TRAINING,
    ) -> RoundServer:
        """A server's life: all rounds that are left, unless the `trap` ends it."""
        model = GlobalModel(ModelFiles.resolve(MODEL).quantized_by(self.quantization))
        samples = [Sample("name[The Mill] =>", "The Mill.")]
        output = RunOutput(model, MODEL, folder, samples=samples, resume=resume)
        options: dict[str, Any] = {
            # budgets come with replies: where plans follow them, everybody takes part in every round
            "config": StrategyConfig(
                wait_for_nodes_s=5.0, fraction_clients=1.0 if self.planned else 0.67, **self.config
            ),
            "limits": LIMITS,
            "eval_batches": EVALUATION,
        }
        plans = planning(frozen_heads=self.frozen_heads) if self.planned else PLANS
        if self.grid:
            strategy = HSplitLoRAMessageStrategy(model, plans, training, output=output, **options)
            trap(strategy.rounds)
            strategy.start(self.grid)
            return strategy.rounds
        legacy = HSplitLoRAStrategy(model, plans, training, **options)
        components = server_components(legacy, output=output)
        assert components.server
        assert components.config
        for node in self.nodes:
            components.server.client_manager().register(node)
        trap(legacy.rounds)
        components.server.fit(components.config.num_rounds, 60.0)
        return legacy.rounds


def ended(step: str, round_number: int) -> Callable[[RoundServer], None]:
    """A trap: Ctrl-C as `step` of `round_number` is about to be taken."""

    def trap(rounds: RoundServer) -> None:
        method = getattr(rounds, step)
        calls = 0

        def interrupted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == round_number - rounds.resumed_after:
                raise KeyboardInterrupt
            return method(*arguments, **options)

        setattr(rounds, step, interrupted)

    return trap


@cache
def uninterrupted(face: str, planned: bool, folder: Path) -> tuple[RoundServer, Path]:
    return Federation(face, planned).run(folder), folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted")


def comparable(rounds: RoundServer) -> Any:
    """Everything of a run's rounds but seconds, and the bytes of clients that take the whole delta anew."""
    history = json.loads(json.dumps([vars(record) for record in rounds.history], default=lambda value: vars(value)))
    for record in history:
        record["seconds"] = record["steps"] = None
        for client in record["clients"]:
            client["seconds"] = client["held_s"] = client["bytes_down"] = None
    return history


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_same_run(found: RoundServer, out: Path, expected: RoundServer, reference: Path) -> None:
    assert comparable(found) == comparable(expected)
    assert found.initial_score == expected.initial_score
    assert_equal_tensors(weights_of(found), weights_of(expected))
    adapter = Path("adapter", "adapter_model.safetensors")
    assert_equal_tensors(load_file(out / adapter), load_file(reference / adapter))
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, reference))
    for key in ("initial_perplexity", "final_perplexity", "rounds", "status", "adapter", "samples", "seed"):
        assert ours[key] == theirs[key], key
    assert ours["final_perplexity"] < ours["initial_perplexity"]


PLACES = {
    "after-round-1": ("open_training", 2),
    "after-round-2": ("open_training", 3),
    "in-the-middle-of-round-2": ("close_training", 2),
    "before-round-2-is-saved": ("close_scoring", 2),
}


@FACES
@pytest.mark.parametrize("planned", [False, True], ids=["configured", "planned"])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_broke_off_ends_as_if_it_had_not(
    face: str, planned: bool, place: str, folder: Path, tmp_path: Path
) -> None:
    expected, reference = uninterrupted(face, planned, folder / f"{face}-{planned}")
    federation = Federation(face, planned)
    out = tmp_path / "out"
    step, round_number = PLACES[place]
    with pytest.raises(KeyboardInterrupt):
        federation.run(out, trap=ended(step, round_number))
    assert json.loads((out / "summary.json").read_text())["reason"] == "KeyboardInterrupt: "
    found = federation.run(out, resume="latest")
    assert found.resumed_after == round_number - 1
    assert not (tmp_path / "out-2").exists()
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["round-0002", "round-0003"]
    assert_same_run(found, out, expected, reference)
    if planned:  # a plan that a wrong budget would have changed
        assert any("memory" in reason for reason in found.history[-1].plan_reasons)
        assert found.history[0].plan
        assert found.history[0].plan.update.rank == 16
    else:
        assert {len(record.clients) for record in found.history} == {2}


def test_heads_that_a_plan_left_untrained_stay_so(tmp_path: Path) -> None:
    expected = Federation("messages", True, frozen_heads=True).run(tmp_path / "whole")
    federation = Federation("messages", True, frozen_heads=True)
    with pytest.raises(KeyboardInterrupt):
        federation.run(tmp_path / "broken", trap=ended("close_training", 2))
    found = federation.run(tmp_path / "broken", resume="latest")
    assert found.resumed_after == 1
    assert_same_run(found, tmp_path / "broken", expected, tmp_path / "whole")
    plans = [record.plan for record in found.history if record.plan]
    assert plans
    assert {rank for plan in plans for client in plan.clients.values() for rank in client.ranks.values()} <= {0}


@FACES
@pytest.mark.parametrize("coding", [{"update_codec": "bf16"}, {"update_rank": 2}], ids=["bf16", "rank 2"])
def test_what_was_not_sent_yet_is_not_lost_either(face: str, coding: dict[str, Any], tmp_path: Path) -> None:
    """Updates go out rounded; what they lack is carried from round to round, and so over the break."""
    expected = Federation(face, False, **coding).run(tmp_path / "whole")
    federation = Federation(face, False, **coding)
    with pytest.raises(KeyboardInterrupt):
        federation.run(tmp_path / "broken", trap=ended("open_training", 3))
    found = federation.run(tmp_path / "broken", resume="latest")
    assert found.resumed_after == 2
    assert_same_run(found, tmp_path / "broken", expected, tmp_path / "whole")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dropout_and_what_stands_beside_a_quantised_base_go_on(quantization: str, tmp_path: Path) -> None:
    """Masks are drawn by seeds alone; the factors beside the base, and what they lack, are in the checkpoint."""
    training = replace(TRAINING, lora_dropout=0.2)
    federation = Federation("legacy", False, quantization, delta_rank=4)
    expected = federation.run(tmp_path / "whole", training=training)
    with pytest.raises(KeyboardInterrupt):
        federation.run(tmp_path / "broken", trap=ended("open_training", 3), training=training)
    found = federation.run(tmp_path / "broken", resume="latest", training=training)
    assert found.resumed_after == 2
    assert_same_run(found, tmp_path / "broken", expected, tmp_path / "whole")
    assert (found.model.delta_error or 0) > 0 or quantization == "none"


@FACES
def test_a_run_may_break_off_again_and_again(face: str, folder: Path, tmp_path: Path) -> None:
    expected, reference = uninterrupted(face, False, folder / f"{face}-False")
    federation = Federation(face, False)
    out = tmp_path / "out"
    for number, resume in ((2, ""), (2, "latest"), (3, str(out))):
        with pytest.raises(KeyboardInterrupt):
            federation.run(out, resume, ended("close_training", number))
    found = Federation(face, False).run(out, "latest")  # clients that know nothing
    assert_same_run(found, out, expected, reference)


@FACES
def test_a_run_whose_rounds_are_over_writes_its_results_again(face: str, folder: Path, tmp_path: Path) -> None:
    """It was killed while it wrote them."""
    expected, reference = uninterrupted(face, False, folder / f"{face}-False")
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    for gone in ("adapter", "merged_model"):
        shutil.rmtree(out / gone)
    found = Federation(face, False).run(out, "latest")
    assert found.rounds_left == 0
    assert_same_run(found, out, expected, reference)


def test_a_client_ahead_of_the_server_does_not_keep_its_delta(tmp_path: Path) -> None:
    """It was at version 2, of a round that the checkpoint lacks; that round is played again, and client 2 fails in it.

    Version 2 is another one then. By the run's id the client knows; else it would say "2", and get nothing.
    """
    failing: list[int] = []

    def fault(fit: Any, ins: Any) -> Any:
        if RoundTask.from_json(ins.config[TASK_KEY]).round in failing:
            raise RuntimeError("no time")
        return fit(ins)

    federation = Federation("legacy", False)
    federation.nodes = [Node(c, [c], Path(MODEL), data_of, fault if c == "2" else None) for c in CLIENTS]
    training = replace(TRAINING, seed=1)  # samples clients 0 and 1, 0 and 2, 0 and 1
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        federation.run(out, trap=ended("close_training", 3), training=training)
    before = held(federation.nodes[1], "1")
    failing.append(2)
    rounds = federation.run(out, str(out / "checkpoints" / "round-0001"), training=training)
    took_part = [{client.client_id for client in record.clients} for record in rounds.history]
    assert took_part == [{"0", "1"}, {"0"}, {"0", "1"}]
    after = held(federation.nodes[1], "1")
    assert (before.version, after.version) == (2, 3)
    for name, total in ((name, rounds.model.log.total.dense(name)) for name in after.names):
        assert torch.allclose(after.total.dense(name), total, rtol=0, atol=1e-6), name


def held(node: LocalNode, client: str) -> Any:
    """The client's copy of the delta, as it would load it for the run that it was of."""
    stamp = ContextNotes(node.context).read(client)
    assert stamp
    model = GlobalModel(ModelFiles.resolve(MODEL))
    names = set(model.head_names(PLANS[client].cut))
    shapes = {name: shape for name, shape in linear_shapes(model.segment).items() if name in names}
    with delta_store(node.context).open(stamp.run, client, shapes) as replica:
        assert replica.version
        return DeltaReplica(replica.version, replica.names, in_memory(replica.total, shapes))


def in_memory(delta: WeightDelta, shapes: dict[str, tuple[int, int]]) -> WeightDelta:
    """What is left of `delta` when its files are another version's."""
    tensors = {key: tensor.clone() for key, tensor in delta.to_tensors().items()}
    return WeightDelta.from_tensors(tensors, shapes)


# --- a server that cannot go on ---


@FACES
def test_a_tail_without_memory_ends_the_run_which_goes_on_with_more(
    face: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refused everybody's batches as if they were wrong, and the run "completed" with rounds that taught nothing."""
    expected, reference = uninterrupted(face, False, folder / f"{face}-False")
    federation = Federation(face, False)

    out = tmp_path / "out"

    def without_memory(logits: Tensor, labels: Tensor) -> Tensor:
        is_first_round_saved = (out / "checkpoints" / "round-0001").exists()
        return torch.empty(1 << 50) if is_first_round_saved else token_losses(logits, labels)

    monkeypatch.setattr(tail_step, "token_losses", without_memory)
    with pytest.raises(RunFailedError, match=r"round 2 that it cannot: .*memory.* \(resume = "):
        federation.run(out)
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")
    found = federation.run(out, resume="latest")
    assert found.resumed_after == 1
    assert_same_run(found, out, expected, reference)


# --- what cannot be resumed, and what costs a checkpoint only ---


def test_a_checkpoint_that_cannot_be_written_costs_nothing_of_the_run(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, reference = uninterrupted("legacy", False, folder / "legacy-False")
    out = tmp_path / "out"

    def no_room(rounds: RoundServer) -> None:
        (out / "checkpoints").write_text("")

    found = Federation("legacy", False).run(out, trap=no_room)
    assert_same_run(found, out, expected, reference)
    lines = [record.message for record in caplog.records if "the checkpoint of this run" in record.message]
    assert len(lines) == 3
    assert all(str(out) in line for line in lines)


def test_other_settings_are_refused_and_named(folder: Path, tmp_path: Path) -> None:
    _, reference = uninterrupted("legacy", False, folder / "legacy-False")
    with pytest.raises(ConfigError, match=r"training\.seed = 0 \(not 7\)"):
        Federation("legacy", False).run(tmp_path, str(reference), training=replace(TRAINING, seed=7))
    with pytest.raises(ConfigError, match=r"fraction-clients = 0\.67 \(not 1\.0\), plans\.workload"):
        Federation("legacy", True).run(tmp_path, str(reference))


def side(folder: Path, **config: Any) -> ServerSide:
    """As an app makes it from its run config."""
    run_config = {"cuts": "1", "ranks": "2", "rounds": 3, "local-steps": 2, "output-dir": str(folder), **config}
    return ServerSide(
        app="app",
        run_config=run_config,
        settings=read_settings(run_config, folder),
        model_name=MODEL,
        files=ModelFiles.resolve(MODEL),
        eval_batches=EVALUATION,
    )


def test_the_apps_resume_by_their_run_config_on_either_face(tmp_path: Path) -> None:
    components = legacy_components(side(tmp_path / "out", **{"dirichlet-alpha": 0.3}))
    server = components.server
    assert isinstance(server, HSplitLoRAServer)
    server.client_manager().register(LocalNode("1", ["0"], MODEL, data_of))
    server.fit(1, 60.0)
    again = {"dirichlet-alpha": 0.3, "resume": "latest", "start-gate-s": 5.0, "keep-checkpoints": 1}
    resumed = legacy_components(side(tmp_path / "out", **again))
    assert resumed.config
    assert resumed.config.num_rounds == 2
    assert message_strategy(side(tmp_path / "out", **again)).rounds.rounds_left == 2
    with pytest.raises(ConfigError, match=r"dirichlet-alpha = 0\.3 \(not 0\.5\)"):
        message_strategy(side(tmp_path / "out", **{**again, "dirichlet-alpha": 0.5}))
    command = json.loads((tmp_path / "out" / "summary.json").read_text())["command"]
    assert "latest" not in command


@pytest.mark.pictures
def test_no_checkpoints(tmp_path: Path) -> None:
    model = GlobalModel(ModelFiles.resolve(MODEL))
    output = RunOutput(model, MODEL, tmp_path / "out", keep_checkpoints=0)
    strategy = HSplitLoRAMessageStrategy(model, PLANS, TRAINING, output=output)
    output.after_round(strategy.rounds)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.json", "report.txt", "run.png"}


def test_a_fresh_run_does_not_write_into_one_that_can_be_resumed(tmp_path: Path) -> None:
    model = GlobalModel(ModelFiles.resolve(MODEL))
    output = RunOutput(model, MODEL, tmp_path / "out")
    output.after_round(HSplitLoRAMessageStrategy(model, PLANS, TRAINING, output=output).rounds)
    (tmp_path / "out" / "summary.json").unlink()
    assert RunOutput(model, MODEL, tmp_path / "out").folder == tmp_path / "out-2"


def test_a_node_that_joins_is_asked_for_the_round_that_opens() -> None:
    """A node that joined in round 3 said what it could afford in round 1."""
    asked: list[int] = []

    def noted(client: str, round_number: int) -> Budget:
        asked.append(round_number)
        return budgets(client, round_number)

    strategy = HSplitLoRAMessageStrategy(GlobalModel(ModelFiles.resolve(MODEL)), planning(), TRAINING)
    node = ClientNode(MODEL, data_of, Context(1, 1, {}, RecordDict(), {}), client_ids=["0"], budgets=noted)
    for played in (0, 2):
        strategy.rounds.load_state({**strategy.rounds.state(), "round": played})
        task = strategy.rounds.probe_task("1")
        assert task
        node.answer({"hsplit-probe": task.to_json()})
    strategy.close()
    assert asked == [1, 3]
