"""The clients that one Flower node hosts: what both faces of a client do with a message."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from flwr.app import Context

from hsplit_flwr.common.checks import require
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.exchange.tls_files import ClientTls
from hsplit_flwr.exchange.transport import connect
from hsplit_flwr.exchange.turns import Said, in_turns
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.roster import NodeAnswer
from hsplit_flwr.federation.trained_head import Refusal, TrainedHead
from hsplit_flwr.flower.client_settings import get, read_tls
from hsplit_flwr.flower.client_state import KeptBudget, delta_store
from hsplit_flwr.flower.flower_log import TEXT, log_as
from hsplit_flwr.flower.messages import PROBE_KEY, TASK_KEY, unpack_turn
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.probe import Link, measure_link
from hsplit_flwr.training.host_memory import return_freed_tensors
from hsplit_flwr.training.workload import ATTENTIONS, PLAIN, QUANTIZATIONS

if TYPE_CHECKING:
    from hsplit_flwr.federation.head_client import HeadClient
    from hsplit_flwr.federation.head_turns import RoundInTurns

Result = TypeVar("Result")
Config = Mapping[str, Any]
"""of a message: scalars and texts by key"""


class Scored(NamedTuple):
    """A client's held-out loss."""

    client: str
    loss: float
    """mean per target token, nats; NaN where there was no token"""
    tokens: int
    """target tokens"""


class ClientNode:
    """The clients of a node.

    Args:
        model: hub name, local folder or GGUF file; must be the server's.
        data: the client's data, or a function from client id to data where one node hosts several clients.
        context: Flower's context of the node. Its node config says where copies of the weight delta are kept
            (``state-dir``), and how large all of them may become (``state-limit-gb``).
        client_ids: the clients this node hosts (default: one, named by ``partition-id`` or the node id).
        dtype: of the frozen weights: fp32, bf16 or fp16.
        quantization: of the linear layers' frozen weights, which then compute in `dtype`: none, nf4, fp4 or int8; must
            be the server's.
        attn_implementation: of attention: sdpa, eager, or auto (what transformers chooses).
        device: ``auto`` takes a GPU if this process was given one.
        tls: for the connection to the tail; default: by the files that the node's or the run's config names
            (`client_settings.read_tls`), without TLS where neither does.
        budgets: (client id, round) -> what that client can afford in that round; default: what the node's config
            states, and measurements for the rest (`planning/budgets/probe.py`). A head beyond it is refused.

    Raises:
        ConfigError: an unknown dtype or quantization, files for TLS that cannot be used, or a wrong value in the node
            config.
    """

    def __init__(
        self,
        model: str,
        data: ClientData | Callable[[str], ClientData],
        context: Context,
        *,
        client_ids: Sequence[str] | None = None,
        dtype: str = "fp32",
        quantization: str = PLAIN,
        attn_implementation: str = "auto",
        device: str = "auto",
        tls: ClientTls | None = None,
        budgets: Callable[[str, int], Budget] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"Expected dtype in {sorted(DTYPES)}, found {dtype!r}.")
        attention = attn_implementation
        require(attention in ATTENTIONS, "attn_implementation", f"as one of {ATTENTIONS}", attention)
        require(quantization in QUANTIZATIONS, "quantization", f"as one of {QUANTIZATIONS}", quantization)
        log_as(get(context.run_config, "log-format", TEXT), context.run_id)
        return_freed_tensors()
        self._client_ids = [default_client_id(context)] if client_ids is None else list(client_ids)
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._budgets = budgets
        self._kept = KeptBudget(context, self._device)
        self._connect = partial(connect, tls=tls or read_tls(context.run_config, context.node_config))
        self._model = model
        self._data = data if callable(data) else lambda client: data
        self._deltas = delta_store(context)
        self._dtype = DTYPES[dtype]
        self._quantization = quantization
        self._attention = attention

    def answer(self, config: Config) -> NodeAnswer:
        """Who lives here, how many clients the simulation runs at a time, what they can afford.

        Budgets only where the server asks for them: without stated ones, that takes a probe of about a second.
        """
        budgets: dict[str, Budget] = {}
        if PROBE_KEY in config and self._budgets:
            next_round = RoundTask.from_json(str(config[PROBE_KEY])).round
            budgets = {client: self._budgets(client, next_round) for client in self._client_ids}
        elif PROBE_KEY in config:
            own = self._kept.measure(lambda: self._measure_link(config))
            budgets = dict.fromkeys(self._client_ids, own)
        return NodeAnswer(tuple(self._client_ids), _simulation_concurrency(), budgets)

    def train(self, config: Config) -> TrainedHead | Refusal | Said:
        """One round of training of the client that the task names (`HeadClient.train`), and its next budget.

        Where the exchange goes over messages, as much of it as the message gets: what is said to the tail, until the
        last one.

        Raises:
            ConfigError: not a task for a client of this node, or data that does not fit.
            ExchangeError: the tail refused a frame or could not be reached.
        """
        task = self._task(config, "train")
        now = self._budget(task)
        trained = self._as_told(config, task, lambda turns: self._heads.train(task, now, turns))
        if isinstance(trained, Said):
            return trained
        return replace(trained, budget=self._budgets(task.client, task.round + 1) if self._budgets else now)

    def score(self, config: Config) -> Scored | Said:
        """Loss of the held-out batches of the client that the task names (raises and returns as `train`)."""
        task = self._task(config, "evaluate")
        now = self._budget(task)
        score = self._as_told(config, task, lambda turns: self._heads.score(task, now, turns))
        if isinstance(score, Said):
            return score
        return Scored(task.client, score.loss if score.tokens else math.nan, score.tokens)

    def _as_told(
        self, config: Config, task: RoundTask, work: "Callable[[RoundInTurns | None], Result]"
    ) -> Result | Said:
        """What `work` returns: the whole round over a connection, or its part of a turn."""
        if not in_turns(task.address):
            return work(None)
        from hsplit_flwr.federation.head_turns import take_turn  # what it computes with takes seconds to import

        return take_turn(self._deltas, task, unpack_turn(config), work)

    @cached_property
    def _heads(self) -> "HeadClient":
        # transformers takes seconds to import: a node that is asked who it hosts does not owe them.
        from hsplit_flwr.federation.head_client import HeadClient
        from hsplit_flwr.models.files import ModelFiles

        return HeadClient(
            self._model,
            ModelFiles.resolve(self._model).attending_by(self._attention).quantized_by(self._quantization),
            self._data,
            self._connect,
            self._deltas,
            dtype=self._dtype,
            device=self._device,
        )

    def _task(self, config: Config, mode: Mode) -> RoundTask:
        task = RoundTask.from_json(str(config.get(TASK_KEY, "")))
        if task.mode != mode or task.client not in self._client_ids:
            raise ConfigError(
                f"Expected a task to {mode} one of the clients {self._client_ids}, "
                f"found one to {task.mode} {task.client!r}."
            )
        return task

    def _budget(self, task: RoundTask) -> Budget | None:
        return self._budgets(task.client, task.round) if self._budgets else self._kept.now()

    def _measure_link(self, config: Config) -> Link:
        from hsplit_flwr.exchange.remote_tail import RemoteTail  # a node that states its budget has no link to measure

        task = RoundTask.from_json(str(config[PROBE_KEY]))
        with RemoteTail(task, task.max_frame_bytes, self._connect) as tail:
            return measure_link(tail.probe)


def default_client_id(context: Context) -> str:
    """``partition-id`` of the node's config where there is one (simulations set it), else the node id."""
    return str(context.node_config.get("partition-id", context.node_id))


def _simulation_concurrency() -> int:
    """How many clients Flower's simulation runs at a time (its actor pool's size); 0 outside of a simulation."""
    ray = sys.modules.get("ray")  # never import it here: a deployed client has no use for it
    if ray is None or not ray.is_initialized():
        return 0
    mine = {name: share for name, share in ray.get_runtime_context().get_assigned_resources().items() if share}
    nodes = [node["Resources"] for node in ray.nodes()]
    # As Flower counts them, node by node; five shares of 0.2 are five, of which `//` makes four.
    return max(1, sum(min(int(node.get(name, 0) / share) for name, share in mine.items()) for node in nodes if mine))
