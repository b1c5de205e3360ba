"""What a run measured, as data: a record per client and round, one summary, and `summary.json`."""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from hsplit_flwr.common.dataclass_state import from_state, to_state
from hsplit_flwr.data.slots import SlotScore
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.round_plan import RoundPlan
from hsplit_flwr.reports.health.records import AggregationHealth, Finding, TailSteps

SUMMARY = "summary.json"
"""name of a summary's file in the run's folder"""
CLIENT_PHASES = ("load", "compute", "exchange")
"""Where a client's time goes: bringing its head up to date, its own passes, waiting for the tail's answers."""
ROUND_PHASES = ("configure", "fit", "aggregate", "evaluate", "federated")
"""Where a round's time goes, as the strategy's hooks see it."""
RunStatus = Literal["running", "completed", "failed"]
"""How far a run is: its summary may be written after every round; a failed one says why."""


@dataclass(frozen=True)
class ClientRecord:
    """One client in one round."""

    client_id: str
    cut: int
    """the split s: its head holds blocks 0 .. s-1"""
    ranks: str
    """the ranks of its adapters, for people (see `describe_ranks`)"""
    mean_rank: float
    tokens: int
    """target tokens trained on"""
    steps: int
    loss: float | None
    """mean loss per token; None if it trained no step"""
    bytes_up: int
    """client to server, framing included"""
    bytes_down: int
    """server to client, framing included"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """by phase, see `CLIENT_PHASES`"""
    held_s: float | None = None
    """of its `exchange` seconds, those in which the tail had its batches, by the tail's own clock; None: unknown"""


@dataclass(frozen=True)
class RoundRecord:
    """One federated round; perplexities are those after its merge, None where not evaluated."""

    round: int
    """from 1, as Flower counts"""
    central_perplexity: float | None = None
    """of the merged model on the server's data"""
    federated_perplexity: float | None = None
    """exp(total NLL / total target tokens) over the clients' validation data"""
    train_loss: float | None = None
    """token-weighted mean over clients and steps"""
    clients: tuple[ClientRecord, ...] = ()
    failures: tuple[str, ...] = ()
    """one line per client that failed"""
    plan: RoundPlan | None = None
    """the plan that this round began to follow; None where the one in force stayed, or plans are configured"""
    plan_reasons: tuple[str, ...] = ()
    """why it changed"""
    drift: float | None = None
    """of the importance profile since the plan in force, before this round: total variation distance, 0..1"""
    importance: Mapping[str, float] = field(default_factory=dict)
    """the importance profile after this round, by module, sum 1"""
    steps: TailSteps | None = None
    """the steps, as the tail saw them"""
    aggregation: AggregationHealth | None = None
    """measured on a few matrices; None where it was not measured"""
    delta_error: float | None = None
    """relative error (Frobenius) of what stands beside a quantised base; None where the base is not quantised"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """by phase, see `ROUND_PHASES`; ``health`` is what measuring `aggregation` took"""

    @property
    def tokens(self) -> int:
        """Target tokens that all its clients trained on."""
        return sum(client.tokens for client in self.clients)

    @property
    def perplexity(self) -> float | None:
        """The central perplexity, or the federated one where there is no central evaluation."""
        return self.federated_perplexity if self.central_perplexity is None else self.central_perplexity


@dataclass(frozen=True)
class _JournalState:
    rounds: tuple[RoundRecord, ...]


class Journal:
    """The records of the rounds so far; facts about a round come in one by one."""

    def __init__(self) -> None:
        self.rounds: list[RoundRecord] = []

    def record(self, number: int) -> RoundRecord:
        """The record of round `number`, begun if it is new."""
        if not self.rounds or self.rounds[-1].round != number:
            self.rounds.append(RoundRecord(round=number))
        return self.rounds[-1]

    def note(self, number: int, **facts: Any) -> None:
        """Set fields of the record of round `number`."""
        self.rounds[-1] = replace(self.record(number), **facts)

    def phase(self, number: int, name: str, started: float) -> None:
        """Phase `name` of round `number` began at `started` (``time.perf_counter``) and ends now."""
        self.note(number, seconds={**self.record(number).seconds, name: time.perf_counter() - started})

    def state(self) -> dict[str, Any]:
        """All records as values that JSON knows; `load_state` gives them back exactly."""
        state: dict[str, Any] = to_state(_JournalState(tuple(self.rounds)))
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state` in place of what was recorded so far.

        Raises:
            ConfigError: not the state of a journal; nothing is changed then.
        """
        records = from_state(_JournalState, state).rounds
        numbers = [record.round for record in records]
        if numbers != sorted(set(numbers)):
            raise ConfigError(f"Expected the rounds of a journal in their order, each once, found {numbers!r:.200}.")
        self.rounds = list(records)


@dataclass(frozen=True)
class BestRound:
    """The round after which the global model had its lowest perplexity; the first of equals."""

    round: int
    perplexity: float
    measured_on: str
    """whose held-out data, in words; the same in all rounds of a run"""
    adapter: str = ""
    """its PEFT adapter, relative to the run's folder; empty: none is kept"""


@dataclass(frozen=True)
class RunSummary:
    """A run, over or under way: what it reached, what it cost and what is needed to repeat it."""

    initial_perplexity: float | None
    """before the first round, on the data of `final_perplexity`"""
    history: tuple[RoundRecord, ...]
    seed: int
    versions: Mapping[str, str | None]
    commit: str | None
    command: str
    wall_seconds: float
    config: Mapping[str, Any] = field(default_factory=dict)
    """the run's configuration as JSON-able values"""
    adapter: Mapping[str, Any] | None = None
    """the exported adapter (`AdapterExport.to_dict`): ranks, relative error, whether it is exact"""
    health: tuple[Finding, ...] = ()
    """the known failure signs, see `health.diagnosis`"""
    samples: tuple[Mapping[str, str], ...] = ()
    """texts of the trained model, e.g. prompt, reference, generated"""
    slots: Mapping[str, SlotScore] | None = None
    """``before`` and ``after`` training -> slots that texts for held-out prompts get right; None: not measured"""
    status: RunStatus = "completed"
    reason: str = ""
    """why it failed, or was completed before its last round"""
    best: BestRound | None = None
    """of the rounds so far; None where no round was scored"""

    @property
    def final_perplexity(self) -> float | None:
        """The perplexity after the last evaluated round; before training where no round was evaluated."""
        evaluated = [r.perplexity for r in self.history if r.perplexity is not None]
        return evaluated[-1] if evaluated else self.initial_perplexity

    def to_dict(self) -> dict[str, Any]:
        """The content of `summary.json`: `rounds` counts, `history` lists; None where a number is not finite.

        Raises:
            ConfigError: a value that JSON does not know.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        head = {
            "initial_perplexity": values.pop("initial_perplexity"),
            "final_perplexity": self.final_perplexity,
            "rounds": len(self.history),
            "status": values.pop("status"),
            "reason": values.pop("reason"),
            "best": values.pop("best"),
        }
        content: dict[str, Any] = json_value({**head, **values})
        return content

    def save(self, path: str | Path) -> None:
        """Write `summary.json`: strict JSON, and whole or not at all (a rename of a finished file)."""
        target = Path(path)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def json_value(value: Any) -> Any:
    """`value` out of what JSON knows: NaN and infinity become None, NumPy scalars plain numbers."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: json_value(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    raise ConfigError(
        f"Expected numbers, texts, lists and mappings in a run's summary, found {type(value).__name__}: "
        f"{value!r:.80}. Convert it before it is recorded."
    )
