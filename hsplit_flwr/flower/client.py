"""The Flower face of a client: a `NumPyClient` that trains the head of its plan against the Strategy's tail.

One Flower `fit` is one round: load the head, bring its weights up to date, stream the steps, return the adapters.
Between rounds a client keeps its copy of the weight delta in Flower's ``context.state``. Losing it costs bytes, not
the run: the client says which version it holds, and the tail sends what is missing.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import NumPyClient

from hsplit_flwr.common.tables import format_bytes
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.exchange.transport import connect
from hsplit_flwr.federation.head_client import ClientData
from hsplit_flwr.flower.client_state import DeltaState, KeptBudget
from hsplit_flwr.flower.messages import (
    BUDGETS_KEY,
    CLIENTS_KEY,
    CONCURRENCY_KEY,
    PROBE_KEY,
    REFUSED_KEY,
    TASK_KEY,
    budgets_to_json,
)
from hsplit_flwr.lora.delta_log import DeltaUpdate
from hsplit_flwr.lora.merge import merge_delta
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, linear_shapes, load_segment
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.probe import Link, measure_link
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.head import score_head, train_head
from hsplit_flwr.training.host_memory import return_freed_tensors
from hsplit_flwr.training.loss import Batch
from hsplit_flwr.training.workload import Workload

_FRAME_MARGIN_BYTES = 1 << 20
_log = logging.getLogger("hsplit_flwr")

NDArrays = list[Any]
Config = dict[str, Any]


class HSplitLoRAClient(NumPyClient):
    """A client of `HSplitLoRAStrategy`.

    Args:
        model: hub name, local folder or GGUF file; must be the Strategy's.
        data: the client's data, or a function from client id to data where one node hosts several clients.
        context: Flower's context, as `client_fn` gets it.
        client_ids: the clients this node hosts (default: one, named by ``partition-id`` or the node id).
        dtype: of the frozen weights: fp32, bf16 or fp16.
        device: ``auto`` takes a GPU if this process was given one.
        root_certificates: PEM file of the authority behind the tail's certificate; None: no TLS.
        budgets: (client id, round) -> what that client can afford in that round; default: what the node's config
            states, and measurements for the rest (`budgets/probe.py`). A head beyond it is refused.
    """

    def __init__(
        self,
        model: str,
        data: ClientData | Callable[[str], ClientData],
        context: Context,
        *,
        client_ids: Sequence[str] | None = None,
        dtype: str = "fp32",
        device: str = "auto",
        root_certificates: str | Path | None = None,
        budgets: Callable[[str, int], Budget] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"Expected dtype in {sorted(DTYPES)}, found {dtype!r}.")
        return_freed_tensors()
        self._files = ModelFiles.resolve(model)
        self._model = model
        self._data = data
        self._context = context
        self._client_ids = [default_client_id(context)] if client_ids is None else list(client_ids)
        self._dtype = DTYPES[dtype]
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        roots = Path(root_certificates).read_bytes() if root_certificates else None
        self._connect = partial(connect, root_certificates=roots)
        self._budgets = budgets

    def get_properties(self, config: Config) -> Config:
        """Who lives here, how many clients the simulation runs at a time (0: a real deployment), what they can afford.

        Budgets only where the strategy asks for them: without stated ones, that takes a probe of about a second.
        """
        properties = {CLIENTS_KEY: json.dumps(self._client_ids), CONCURRENCY_KEY: _simulation_concurrency()}
        if PROBE_KEY not in config:
            return properties
        if self._budgets:
            budgets = {client: self._budgets(client, 1) for client in self._client_ids}
        else:
            own = KeptBudget(self._context, self._device).measure(lambda: self._measure_link(config))
            budgets = dict.fromkeys(self._client_ids, own)
        return {**properties, BUDGETS_KEY: budgets_to_json(budgets)}

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """One round of training; returns A and B of every adapted module in model order, then one vector with the
        importance of every linear layer of the head (empty where none was measured); and figures.

        A head beyond the client's budget is not loaded: no arrays, and the reason under ``refused``.

        Raises:
            ConfigError: not a task of `HSplitLoRAStrategy`, or data that does not fit.
            ExchangeError: the tail refused a frame or could not be reached.
        """
        task = self._task(config, "train")
        budget = self._budget(task)
        next_budget = self._next_budget(task, budget)
        if refusal := self._refusal(task, budget):
            return [], 0, {"client": task.client, REFUSED_KEY: refusal, **next_budget}
        head = self._load_head(task)
        started = time.perf_counter()
        with self._open_tail(task, head) as tail:
            self._update_weights(task, head, tail)
            adapters = SegmentAdapters(head, task.plan.lora, head.linear_modules())
            adapters.reset(task.adapter_seed)
            load_s = time.perf_counter() - started
            batches = _bounded(self._client_data(task.client).training_batches(task.first_step), task.workload)
            report = train_head(head, adapters, batches, tail, task.training, task.first_step)
        arrays = [f.numpy() for factors in adapters.factors().values() for f in (factors.A, factors.B)]
        importance = [report.importance[name] for name in head.linear_modules() if report.importance]
        arrays.append(np.array(importance, dtype=np.float32))
        figures: Config = {
            "client": task.client,
            "loss": float(np.mean(report.losses)),
            "load_s": load_s,
            "compute_s": report.compute_s,
            "exchange_s": report.exchange_s,
            **next_budget,
        }
        return arrays, report.tokens, figures

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Score the held-out batches: head here, tail on the server, no gradients."""
        task = self._task(config, "evaluate")
        if refusal := self._refusal(task, self._budget(task)):
            raise ConfigError(refusal)
        head = self._load_head(task)
        with self._open_tail(task, head) as tail:
            self._update_weights(task, head, tail)
            score = score_head(head, _bounded(self._client_data(task.client).evaluate, task.workload), tail)
        return score.nll / max(1, score.tokens), score.tokens, {"client": task.client}

    def _task(self, config: Config, mode: Mode) -> RoundTask:
        task = RoundTask.from_json(str(config.get(TASK_KEY, "")))
        if task.mode != mode or task.client not in self._client_ids:
            raise ConfigError(
                f"Expected a task to {mode} one of the clients {self._client_ids}, "
                f"found one to {task.mode} {task.client!r}."
            )
        return task

    def _refusal(self, task: RoundTask, budget: Budget | None) -> str | None:
        """Why this client cannot afford its head, with the figures; None if it can, or nobody set a budget."""
        if task.workload is None or budget is None:
            return None
        costs = _model_costs(self._model, task.workload)
        names = [matrix.name for matrix in costs.matrices if matrix.block < task.plan.cut]
        needed = costs.head_memory(task.plan.cut, {name: task.plan.lora.rank(name) for name in names})
        if needed.total_bytes <= budget.memory_bytes:
            return None
        return (
            f"Expected a head within this client's {format_bytes(budget.memory_bytes)}, found a plan (cut "
            f"{task.plan.cut}) that takes {format_bytes(needed.total_bytes)}: {needed}. "
            "Plan it less, or give the client more memory."
        )

    def _budget(self, task: RoundTask) -> Budget | None:
        if self._budgets:
            return self._budgets(task.client, task.round)
        return KeptBudget(self._context, self._device).now()

    def _next_budget(self, task: RoundTask, now: Budget | None) -> Config:
        budget = self._budgets(task.client, task.round + 1) if self._budgets else now
        return {BUDGETS_KEY: budgets_to_json({task.client: budget})} if budget else {}

    def _measure_link(self, config: Config) -> Link:
        task = RoundTask.from_json(str(config[PROBE_KEY]))
        with RemoteTail(task, task.max_frame_bytes, self._connect) as tail:
            return measure_link(tail.probe)

    def _load_head(self, task: RoundTask) -> Segment:
        head = load_segment(self._files, 0, task.plan.cut, dtype=self._dtype, device=self._device)
        head.gradient_checkpointing = bool(task.workload and task.workload.gradient_checkpointing)
        return head

    def _open_tail(self, task: RoundTask, head: Segment) -> RemoteTail:
        largest = max(4 * rows * columns for rows, columns in linear_shapes(head).values())
        limit = max(task.max_frame_bytes, largest + _FRAME_MARGIN_BYTES)
        return RemoteTail(task, limit, self._connect)

    def _client_data(self, client: str) -> ClientData:
        return self._data(client) if callable(self._data) else self._data

    def _update_weights(self, task: RoundTask, head: Segment, tail: RemoteTail) -> None:
        shapes = linear_shapes(head)
        state = DeltaState(self._context, task.run, task.client)
        replica = state.load(shapes)
        have = replica.version or 0
        version, whole, tensors = tail.fetch_delta(have)
        base = None if whole else have
        replica.apply(DeltaUpdate.from_tensors(tensors, shapes, base=base, version=version), shapes)
        merge_delta(head, self._files, replica.total, replica.total.names())
        state.save(replica)


@lru_cache(maxsize=4)
def _model_costs(model: str, workload: Workload) -> ModelCosts:
    return ModelCosts(ModelFiles.resolve(model).config, workload)


def _bounded(batches: Iterable[Batch], workload: Workload | None) -> Iterator[Batch]:
    """`batches`, none larger than the plan was made for: a larger one would take memory that nobody granted."""
    for batch in batches:
        rows, width = batch["labels"].shape
        if workload and (rows > workload.batch_size or width > workload.sequence_length):
            raise ConfigError(
                f"Expected batches of at most {workload.batch_size} x {workload.sequence_length} tokens, as the plan "
                f"was made for, found {rows} x {width}. Raise the strategy's workload, or use smaller batches."
            )
        yield batch


def default_client_id(context: Context) -> str:
    """``partition-id`` of the node's config where there is one (simulations set it), else the node id."""
    return str(context.node_config.get("partition-id", context.node_id))


def _simulation_concurrency() -> int:
    """How many clients Flower's simulation runs at a time (its actor pool's size); 0 outside of a simulation."""
    ray = sys.modules.get("ray")  # never import it here: a deployed client has no use for it
    if ray is None or not ray.is_initialized():
        return 0
    mine = ray.get_runtime_context().get_assigned_resources()
    pools = [int(total // mine[name]) for name, total in ray.cluster_resources().items() if mine.get(name)]
    return max(1, min(pools, default=1))
