"""Who is asked for what in a round: the clients that are sampled, their tokens at the tail's door, their tasks."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.federation.acceptance import Expected
from hsplit_flwr.federation.door import Door
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.handed_in import HandedIn
from hsplit_flwr.federation.roster import Present
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.lora.aggregation import STACKING
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.planning.plans import PlansInForce
from hsplit_flwr.training.config import ClientPlan, TrainingConfig


class RoundTasks:
    """The tasks of one run's rounds.

    Args:
        model: the global model.
        plans: those in force.
        config: whom a round samples, and for how long.
        open_door: the run's id -> the door to the tail; called once, before the first task.
        max_frame_bytes: largest frame that clients are told to accept.
        reconnect_grace_s: how long clients are told that they may take to come back.
    """

    def __init__(
        self,
        model: GlobalModel,
        plans: PlansInForce,
        config: StrategyConfig,
        open_door: Callable[[str], Door],
        *,
        max_frame_bytes: int,
        reconnect_grace_s: float,
    ) -> None:
        self._model = model
        self._plans = plans
        self._config = config
        self._open_door = open_door
        self._max_frame_bytes = max_frame_bytes
        self._reconnect_grace_s = reconnect_grace_s
        self._run = f"{random.SystemRandom().getrandbits(64):016x}"
        self._asked: dict[str, ClientPlan] = {}
        self.handed_in = HandedIn()
        """what clients' adapters may go on from"""
        self.opened: Door | None = None
        """the door; None before the first task"""

    @property
    def door(self) -> Door:
        """The door, opened if it is not yet."""
        if self.opened is None:
            self.opened = self._open_door(self._run)
        return self.opened

    def probe(self, round_number: int, node: str, training: TrainingConfig) -> RoundTask:
        """How `node` measures its link to the tail before that round."""
        token = self.door.open_probe(node, round_number)
        return self._task(round_number, "probe", node, token, ClientPlan(1, LoraSpec(0)), training)

    def open(self, round_number: int, mode: Mode, present: Present, training: TrainingConfig) -> dict[str, RoundTask]:
        """Sample clients and admit them at the door; returns every one's task."""
        plans = self._asked = {
            client: self._plans.plan(client) for client in self._sample(round_number, present, training)
        }
        tokens = self.door.open_round(
            round_number,
            mode,
            {client: plan.cut for client, plan in plans.items()},
            training.first_step(round_number),
            [c for c, plan in plans.items() if not any(map(plan.lora.rank, self._model.head_names(plan.cut)))],
            steps=training.local_steps if mode == "train" else None,
            workload=self._plans.workload,
        )
        return {c: self._task(round_number, mode, c, tokens[c], plan, training) for c, plan in plans.items()}

    def expected(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Expected]:
        """What each client of the round was asked for; `shapes` are of all linear layers."""
        return {
            client: Expected(plan, {name: shapes[name] for name in self._model.head_names(plan.cut)})
            for client, plan in self._asked.items()
        }

    def _sample(self, round_number: int, present: Present, training: TrainingConfig) -> list[str]:
        able = sorted(filter(self._plans.takes_part, present.clients))
        count = min(len(able), max(1, round(self._config.fraction_clients * len(able))))
        generator = random.Random(derive_seed(training.seed, "sample", round_number))
        return sorted(generator.sample(able, count))

    def _task(
        self, round_number: int, mode: Mode, client: str, token: str, plan: ClientPlan, training: TrainingConfig
    ) -> RoundTask:
        return RoundTask(
            run=self._run,
            round=round_number,
            client=client,
            mode=mode,
            address=self.door.address,
            token=token,
            time_limit_s=self._config.round_limit_s,
            max_frame_bytes=self._max_frame_bytes,
            plan=replace(plan, lora=plan.lora.spelled_out(self._model.head_names(plan.cut))),
            training=training,
            workload=self._plans.workload,
            common_start=self._config.rule not in STACKING,
            reconnect_grace_s=self._reconnect_grace_s,
            kept_from=self.handed_in.round_of(client),
        )
