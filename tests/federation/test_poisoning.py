"""A federation with an admitted client that wants to ruin the model: real clients over real gRPC, whole rounds."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import FitIns, FitRes
from torch import Tensor

from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.messages import ARRAYS_KEY, TASK_KEY
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.aggregation import Contribution
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.spec import LoraSpec, is_literal
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import Fault, Fit, Node, build_one_at_a_time, manager_of, play_round, random_batches
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.timeout(120)

STEPS, ATTACKER = 2, "1"
PLANS = {
    "0": ClientPlan(2, LoraSpec(2, 4.0)),
    ATTACKER: ClientPlan(2, LoraSpec(2, 4.0, rank_pattern={r"h\.\d\.mlp\..*": 4})),
    "2": ClientPlan(1, LoraSpec(2, 4.0)),
}
TRAINING = TrainingConfig(rounds=2, local_steps=STEPS, learning_rate=0.02, warmup_steps=0)
RATIO = 3.0
ROUNDING = 1e-4
"""largest relative difference between a bound and float32 sums"""
BATCHES = {client: random_batches(STEPS, seed=int(client), rows=2 + 4 * (client == ATTACKER)) for client in PLANS}
Weights = dict[str, Tensor]


@dataclass
class Outcome:
    """Two rounds: weights after each, what was aggregated in each, losses and what was said."""

    weights: list[Weights]
    contributions: list[list[Contribution]]
    perplexities: list[float]
    failures: list[tuple[str, ...]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def play(model: Path, fault: Fault | None = None, **config: Any) -> Outcome:
    strategy = HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(model))),
        PLANS,
        TRAINING,
        tail_lora=LoraSpec(2, 4.0),
        config=StrategyConfig(federated_evaluation=False, **config),
        limits=BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0),
        eval_batches=random_batches(2, seed=9),
    )
    merge, taken = strategy.rounds.merge, []

    def noted(contributions: list[Contribution], tail: dict[str, LoraFactors]) -> None:
        taken.append(contributions)
        merge(contributions, tail)

    strategy.rounds.merge = noted  # type: ignore[method-assign, assignment]
    nodes = [
        Node(f"{100 + int(c)}", [c], model, lambda c: ClientData(train=BATCHES[c]), fault if c == ATTACKER else None)
        for c in PLANS
    ]
    played = [play_round(strategy, manager_of(*nodes), number) for number in (1, 2)]
    strategy.close()
    return Outcome(
        [{**p.weights} for p in played],
        taken,
        [p.central["perplexity"] for p in played],
        [record.failures for record in strategy.history],
    )


def sent_with(factor: float) -> Fault:
    """An honest round of training, whose every B is then multiplied."""

    def fault(fit: Fit, ins: FitIns) -> FitRes:
        res = fit(ins)
        for place, name in enumerate(json.loads(str(res.metrics[ARRAYS_KEY]))):
            if name.endswith("|B"):
                buffer = io.BytesIO()
                np.save(buffer, np.load(io.BytesIO(res.parameters.tensors[place])) * np.float32(factor))
                res.parameters.tensors[place] = buffer.getvalue()
        return res

    return fault


def distance(a: Weights, b: Weights) -> float:
    return math.sqrt(sum(float((a[name] - b[name]).double().norm()) ** 2 for name in a))


def dense_norms(contribution: Contribution) -> list[float]:
    return [float((f.scaling * f.B.double() @ f.A.double()).norm()) for f in contribution.factors.values()]


def test_an_attacker_moves_the_weights_by_no_more_than_the_bound(model: Path) -> None:
    """Clipped to RATIO times the median, p_i sqrt(n_i) (limit + its honest size) is all that its lie can change."""
    honest = play(model)
    attacked = play(model, sent_with(-1000.0), max_update_ratio=RATIO)
    sizes = [math.sqrt(np.mean(np.square(dense_norms(c)))) for c in honest.contributions[0]]
    weight, own_norm = honest.contributions[0][1].weight, float(np.linalg.norm(dense_norms(honest.contributions[0][1])))
    clipped = RATIO * float(np.median([sizes[0], 1000 * sizes[1], sizes[2]]))
    bound = weight * (math.sqrt(len(dense_norms(honest.contributions[0][1]))) * clipped + own_norm)
    moved = distance(attacked.weights[0], honest.weights[0])
    assert moved == pytest.approx(bound, rel=1e-3)  # straight against its own direction: the bound is reached
    assert moved <= bound * (1 + ROUNDING)
    assert [len(lines) for lines in attacked.failures] == [1, 1]
    assert attacked.failures[0][0].startswith("client 1: Expected an update of size <= ")


def test_without_the_bound_the_same_attacker_ruins_the_model(model: Path) -> None:
    honest, ruined = play(model), play(model, sent_with(-1000.0))
    bounded = play(model, sent_with(-1000.0), max_update_ratio=RATIO, max_share=0.34)
    ruin, move = distance(ruined.weights[0], honest.weights[0]), distance(bounded.weights[0], honest.weights[0])
    assert ruin > 100 * move
    assert ruined.perplexities[1] > 1.4 * honest.perplexities[1]
    assert bounded.perplexities[1] < 1.1 * honest.perplexities[1]


def test_a_refused_attacker_is_as_if_it_had_not_finished(model: Path) -> None:
    def fails(fit: Fit, ins: FitIns) -> FitRes:
        fit(ins)
        raise RuntimeError("gone")

    refused = play(model, sent_with(-1000.0), max_update_ratio=RATIO, update_excess="refuse")
    absent = play(model, fails)
    for a, b in zip(refused.weights, absent.weights, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert all("left out" in lines[0] and lines[0].startswith("client 1: ") for lines in refused.failures)


def test_generous_bounds_change_nothing_without_an_attacker(model: Path) -> None:
    plain = play(model)
    generous = play(model, max_update_ratio=100.0, max_update_norm=1e3, max_share=0.99)
    for a, b in zip(plain.weights, generous.weights, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert plain.failures == generous.failures == [(), ()]


def test_a_client_with_most_of_the_tokens_has_no_more_than_its_share(model: Path) -> None:
    plain, bounded = play(model), play(model, max_share=0.4)
    tokens = {c: sum(int((b["labels"][:, 1:] != -100).sum()) for b in BATCHES[c]) for c in PLANS}
    assert [c.weight for c in plain.contributions[0]] == [tokens[c] / sum(tokens.values()) for c in PLANS]
    assert plain.contributions[0][1].weight > 0.5
    assert [c.weight for c in bounded.contributions[0]] == pytest.approx([0.3, 0.4, 0.3])
    assert distance(plain.weights[0], bounded.weights[0]) > 0


def test_no_regular_expression_reaches_a_client(model: Path) -> None:
    seen: list[dict[str, Any]] = []

    def noting(fit: Fit, ins: FitIns) -> FitRes:
        seen.append(json.loads(str(ins.config[TASK_KEY]))["plan"]["lora"])
        return fit(ins)

    outcome = play(model, noting)
    assert not all(map(is_literal, PLANS[ATTACKER].lora.rank_pattern))
    assert all(is_literal(key) for lora in seen for key in [*lora["rank_pattern"], *lora["alpha_pattern"]])
    ranks = {name: factors.rank for name, factors in outcome.contributions[0][1].factors.items()}
    assert ranks == {name: PLANS[ATTACKER].lora.rank(name) for name in ranks}
    assert sorted(set(ranks.values())) == [2, 4]
