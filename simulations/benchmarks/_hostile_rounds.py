"""The attacker of `hostile.py` in a round's messages: whole rounds of three clients over gRPC, one of which lies.

What must come of a lie is one of three: the weights of a run in which that client is honest, the weights of a run in
which it does not finish, or weights within the stated bound (docs/deployment.md) of those of the honest run.
"""

import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from flwr.common import FitIns, FitRes
from torch import Tensor

from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.messages import ARRAYS_KEY, CLIENT_KEY
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.aggregation import Contribution
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import Fault, Fit, Node, build_one_at_a_time, manager_of, play_round, random_batches
from tests.helpers.models import tiny_model

CLIENTS, ATTACKER, THIEF = ("0", "1", "2"), "1", "999"
STEPS = 2
PLANS = {client: ClientPlan(2, LoraSpec(2, 4.0)) for client in CLIENTS}
TRAINING = TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=0.02, warmup_steps=0)
LIMITS = BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0)
RATIO = 3.0
ROUNDING = 1e-4
"""largest relative difference between the bound and float32 sums"""
BATCHES = {client: random_batches(STEPS, seed=int(client), rows=2) for client in CLIENTS}
Weights = dict[str, Tensor]
Becomes = Literal["honest", "absent", "bounded"]


@dataclass
class Played:
    """A round: the weights after it, and what was aggregated."""

    weights: Weights
    contributions: list[Contribution] = field(default_factory=list)


@dataclass(frozen=True)
class Lie:
    """What an admitted client sends, and what must come of it."""

    fault: Fault | None
    becomes: Becomes
    config: Mapping[str, Any] = field(default_factory=dict)
    is_claimed_twice: bool = False
    """another node says that it hosts client 0"""


def edited(edit: Callable[[FitRes], None]) -> Fault:
    """An honest round of training, and another answer."""

    def fault(fit: Fit, ins: FitIns) -> FitRes:
        res = fit(ins)
        edit(res)
        return res

    return fault


def figures(**values: Any) -> Callable[[FitRes], None]:
    """Other figures than the true ones."""

    def edit(res: FitRes) -> None:
        res.metrics |= values
        res.num_examples = int(values.get("tokens", res.num_examples))

    return edit


def factors_b(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[FitRes], None]:
    """Every B of the update changed."""

    def edit(res: FitRes) -> None:
        for place, name in enumerate(json.loads(str(res.metrics[ARRAYS_KEY]))):
            if name.endswith("|B"):
                buffer = io.BytesIO()
                np.save(buffer, change(np.load(io.BytesIO(res.parameters.tensors[place]))))
                res.parameters.tensors[place] = buffer.getvalue()

    return edit


def _absent(fit: Fit, ins: FitIns) -> FitRes:
    fit(ins)
    raise RuntimeError("gone")


def _bytes_of_a_pickle(res: FitRes) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"not": "an array"}], dtype=object), allow_pickle=True)
    res.parameters.tensors[0] = buffer.getvalue()


REFUSING = {"max_update_ratio": RATIO, "update_excess": "refuse"}
LIES: Mapping[str, Lie] = {
    "tokens: a thousand million": Lie(edited(figures(tokens=10**9)), "honest"),
    "tokens: 10^18": Lie(edited(figures(tokens=10**18)), "absent"),
    "tokens: none": Lie(edited(figures(tokens=0)), "honest"),
    "loss: NaN": Lie(edited(figures(loss=math.nan)), "absent"),
    "seconds: infinite": Lie(edited(figures(compute_s=math.inf)), "absent"),
    "update: B x -1000, refused": Lie(edited(factors_b(lambda b: b * np.float32(-1000))), "absent", REFUSING),
    "update: B x -1000, clipped": Lie(
        edited(factors_b(lambda b: b * np.float32(-1000))), "bounded", {"max_update_ratio": RATIO}
    ),
    "update: NaN": Lie(edited(factors_b(lambda b: b * np.float32(np.nan))), "absent"),
    "update: 1e30": Lie(edited(factors_b(lambda b: b * 0 + np.float32(1e30))), "absent"),
    "update: another shape": Lie(edited(factors_b(lambda b: b[:-1])), "absent"),
    "update: a pickle": Lie(edited(_bytes_of_a_pickle), "absent"),
    "identity: answers as client 0": Lie(edited(figures(**{CLIENT_KEY: "0"})), "absent"),
    "identity: a node that claims client 0": Lie(None, "honest", is_claimed_twice=True),
}


class Rounds:
    """Plays a round with and without a lie. Use as a context manager."""

    def __enter__(self) -> "Rounds":
        self._patched = pytest.MonkeyPatch()
        self._scratch = tempfile.TemporaryDirectory()
        self._model = Path(self._scratch.name)
        tiny_model("gpt2").save_pretrained(self._model)
        build_one_at_a_time(self._patched, "load_segment", "SegmentAdapters")
        self._expected = {"honest": self._play(Lie(None, "honest")), "absent": self._play(Lie(_absent, "absent"))}
        return self

    def __exit__(self, *error: object) -> None:
        self._patched.undo()
        self._scratch.cleanup()

    def row(self, name: str) -> dict[str, Any]:
        """What became of a lie."""
        lie, started = LIES[name], time.monotonic()
        found = self._play(lie)
        seconds = time.monotonic() - started
        expected = self._expected["honest" if lie.becomes == "bounded" else lie.becomes].weights
        moved = math.sqrt(sum(float((found.weights[key] - expected[key]).double().norm()) ** 2 for key in expected))
        limit = self._bound() if lie.becomes == "bounded" else 0.0
        is_kept = moved <= limit * (1 + ROUNDING)
        return {
            "attack": name,
            "attempts": 1,
            "accepted_wrong": int(not is_kept),
            "hangs": int(seconds > LIMITS.start_gate_s),
            "honest_equal": is_kept,
            "becomes": lie.becomes,
            "moved": moved,
            "bound": limit,
            "seconds": seconds,
        }

    def _bound(self) -> float:
        """How far one client can move the weights: p (sqrt(n) limit + its honest size)."""
        contributions = self._expected["honest"].contributions
        norms = [
            [float((f.scaling * f.B.double() @ f.A.double()).norm()) for f in c.factors.values()] for c in contributions
        ]
        sizes = [math.sqrt(float(np.mean(np.square(of)))) for of in norms]
        index = CLIENTS.index(ATTACKER)
        sizes[index] *= 1000
        own = float(np.linalg.norm(norms[index]))
        return contributions[index].weight * (math.sqrt(len(norms[index])) * RATIO * float(np.median(sizes)) + own)

    def _play(self, lie: Lie) -> Played:
        strategy = HSplitLoRAStrategy(
            GlobalModel(ModelFiles.resolve(str(self._model))),
            PLANS,
            TRAINING,
            tail_lora=LoraSpec(2, 4.0),
            config=StrategyConfig(federated_evaluation=False, **lie.config),
            limits=LIMITS,
        )
        merge, taken = strategy.rounds.merge, []

        def noted(contributions: list[Contribution], tail: dict[str, LoraFactors]) -> None:
            taken.extend(contributions)
            merge(contributions, tail)

        strategy.rounds.merge = noted  # type: ignore[method-assign, assignment]
        nodes = [self._node(f"{100 + int(c)}", c, lie.fault if c == ATTACKER else None) for c in CLIENTS]
        if lie.is_claimed_twice:
            nodes.append(self._node(THIEF, "0", None))
        try:
            played = play_round(strategy, manager_of(*nodes), 1)
        finally:
            strategy.close()
        return Played({name: weight.clone() for name, weight in played.weights.items()}, taken)

    def _node(self, cid: str, client: str, fault: Fault | None) -> Node:
        return Node(cid, [client], self._model, lambda c: ClientData(train=BATCHES[c]), fault)
