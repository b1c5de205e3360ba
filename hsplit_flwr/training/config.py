"""What a run and a round are made of, as data: training settings, a client's plan, a client's task for one round."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.workload import ACTIVATION_DTYPES, Workload

PROTOCOL_VERSION = 2
Mode = Literal["train", "evaluate", "probe"]
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainingConfig:
    """How heads and tail train: AdamW under one learning-rate schedule that spans the whole run.

    Adapters that are aggregated start afresh every round, and AdamW with them; the schedule does not.
    Head and tail clip their own gradients to `max_grad_norm` (0: no clipping).
    """

    rounds: int = 5
    local_steps: int = 20
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    activation_dtype: str = "fp32"
    seed: int = 0
    importance_steps: int = 1
    """the first steps of every round that also measure weight importance (`training/importance.py`); 0: none"""
    importance_rows: int = 2
    """rows of each batch that importance is measured on; 0: all"""
    joint_steps: bool = False
    """the tail takes one optimiser step on the batches of all clients of a step; else one on each client's batch"""
    tail_passes: int = 1
    """over the batches of a step; those after the first are the tail's alone, taken once the clients have their answers
    and compute"""

    def __post_init__(self) -> None:
        _require(_whole(self.rounds, 1) and _whole(self.local_steps, 1), "rounds and local_steps >= 1", self)
        _require(_whole(self.warmup_steps, 0), "warmup_steps >= 0", self)
        _require(_whole(self.tail_passes, 1), "tail_passes >= 1", self)
        importance = _whole(self.importance_steps, 0) and _whole(self.importance_rows, 0)
        _require(importance, "importance_steps and importance_rows >= 0", self)
        _require(0 < self.learning_rate < math.inf, "learning_rate > 0", self)
        _require(0 <= self.weight_decay < math.inf, "weight_decay >= 0", self)
        _require(0 <= self.max_grad_norm < math.inf, "max_grad_norm >= 0 (0: no clipping)", self)
        _require(self.schedule in SCHEDULES, f"schedule in {SCHEDULES}", self)
        _require(self.activation_dtype in ACTIVATION_DTYPES, f"activation_dtype in {ACTIVATION_DTYPES}", self)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of one client over the whole run."""
        return self.rounds * self.local_steps

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of run step `step` (0-based): linear warm-up, then the schedule down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = max(0.0, 1.0 - done)
        return self.learning_rate * (left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


@dataclass(frozen=True)
class ClientPlan:
    """One client's share: its head holds blocks 0..cut-1 and trains adapters by `lora` on them."""

    cut: int
    lora: LoraSpec

    def __post_init__(self) -> None:
        _require(_whole(self.cut, 1), "a cut >= 1 (blocks held by the client)", self.cut)


@dataclass(frozen=True)
class RoundTask:
    """Everything a client needs to know for one `fit` or `evaluate`; travels as JSON in the Flower config."""

    run: str
    round: int
    client: str
    mode: Mode
    address: str
    token: str
    time_limit_s: float
    max_frame_bytes: int
    plan: ClientPlan
    training: TrainingConfig
    workload: Workload | None = None
    """what the plan was made for; larger batches are refused"""
    common_start: bool = False
    """see `head_seed`"""

    @property
    def first_step(self) -> int:
        """The run step (0-based) at which this round starts."""
        return (self.round - 1) * self.training.local_steps

    @property
    def adapter_seed(self) -> int:
        """Decides this client's fresh adapters in this round."""
        return head_seed(self.training.seed, self.round, self.client, self.common_start)

    def to_json(self) -> str:
        """The JSON text that `from_json` reads."""
        plan = {"cut": self.plan.cut, "lora": self.plan.lora.to_dict()}
        flat = {f.name: getattr(self, f.name) for f in fields(self)}
        workload = asdict(self.workload) if self.workload else None
        training = asdict(self.training)
        data = {**flat, "plan": plan, "training": training, "workload": workload, "protocol": PROTOCOL_VERSION}
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The task that `to_json` wrote.

        Raises:
            ConfigError: not a task, or one of another protocol version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            protocol = data.pop("protocol")
            if protocol != PROTOCOL_VERSION:
                raise ConfigError(
                    f"Expected a task of protocol version {PROTOCOL_VERSION}, found {protocol}. "
                    "Install the same hsplit_flwr version on server and clients."
                )
            plan = ClientPlan(cut=data["plan"]["cut"], lora=LoraSpec.from_dict(data["plan"]["lora"]))
            workload = Workload(**data["workload"]) if data["workload"] else None
            training = TrainingConfig(**data["training"])
            return cls(**{**data, "plan": plan, "training": training, "workload": workload})
        except ConfigError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ConfigError(f"Expected a round task of hsplit_flwr in the Flower config, found {error!r}.") from error


def tail_seed(seed: int, round_: int) -> int:
    """Decides the tail's fresh adapters in a round of the run of `seed`."""
    return derive_seed(seed, "tail", round_)


def head_seed(seed: int, round_: int, client: str, common_start: bool) -> int:
    """Decides the fresh adapters of a client's head; with a common start they are those of every other head and tail.

    Stacked adapters may start anywhere, and learn more from different starts. What is averaged must start alike, or the
    average is of unrelated things.
    """
    return tail_seed(seed, round_) if common_start else derive_seed(seed, "head", round_, client)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any parts: equal parts, equal seed, on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def plans_from_table(
    cuts: Mapping[str, int],
    ranks: Mapping[str, int],
    *,
    lora_alpha: float = 16.0,
    target_modules: str = "",
) -> dict[str, ClientPlan]:
    """Plans per client id from two small tables, with one alpha for all."""
    if set(cuts) != set(ranks):
        raise ConfigError(f"Expected cuts and ranks for the same clients, found {sorted(cuts)} and {sorted(ranks)}.")
    targets = tuple(target_modules.split()) if target_modules else "all-linear"
    return {client: ClientPlan(cuts[client], LoraSpec(ranks[client], lora_alpha, targets)) for client in cuts}


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require(condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise ConfigError(f"Expected {expected}, found {found}.")
