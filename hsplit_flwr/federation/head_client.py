"""A client of a round, whoever carries the messages: load the head, bring it up to date, train or score, report."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from hsplit_flwr.common.tables import format_bytes
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.transport import Connect
from hsplit_flwr.federation.client_data import ClientData, DeltaStore
from hsplit_flwr.federation.head_turns import RoundInTurns
from hsplit_flwr.federation.trained_head import Refusal, Shapes, TrainedHead
from hsplit_flwr.lora.delta_update import DeltaReplica, DeltaUpdate, OwnFactors
from hsplit_flwr.lora.factors import LoraFactors, dense_bytes
from hsplit_flwr.lora.merge import merge_beneath
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, linear_shapes, load_segment
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.head import HeadTraining, score_head, train_head
from hsplit_flwr.training.loss import Score
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.workload import PLAIN, Workload

if TYPE_CHECKING:
    from hsplit_flwr.planning.costs.model_costs import ModelCosts

_FRAME_MARGIN_BYTES = 1 << 20


class HeadClient:
    """The clients of one process, as far as a round concerns them.

    Args:
        model: hub name, local folder or GGUF file, as `files` was resolved from; must be the server's.
        files: the base model, quantised or not.
        data: client id -> its data.
        connect: how the tail is reached.
        deltas: where copies of the weight delta are kept.
        dtype: of the frozen weights.
        device: where heads compute.
    """

    def __init__(
        self,
        model: str,
        files: ModelFiles,
        data: Callable[[str], ClientData],
        connect: Connect,
        deltas: DeltaStore,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self._model = model
        self._files = files
        self._data = data
        self._connect = connect
        self._deltas = deltas
        self._dtype = dtype
        self._device = device

    def train(
        self, task: RoundTask, budget: Budget | None = None, turns: RoundInTurns | None = None
    ) -> TrainedHead | Refusal:
        """One round of training; a head beyond `budget` is not loaded but refused.

        Args:
            task: of one of the clients.
            budget: what it can afford now; None: anything.
            turns: where the exchange goes over messages; None: it goes over a connection.

        Raises:
            ConfigError: data that does not fit the task.
            ExchangeError: the tail refused a frame or could not be reached.
            Suspended: this turn ends before the round does.
        """
        self._require_same_base(task)
        if reason := self._refusal(task, budget):
            return Refusal(task.client, reason)
        head = self._load_head(task)
        started = time.perf_counter()
        with self._open_tail(task, head, turns) as tail:
            adapters = SegmentAdapters(head, task.plan.lora, head.linear_modules())
            adapters.reset(task.adapter_seed)
            optimizer = Optimizer(adapters.parameters(), task.training)
            start = self._go_on(task, adapters, optimizer)
            self._update_weights(task, head, tail, turns, start or {})
            load_s = time.perf_counter() - started
            batches = _bounded(self._data(task.client).training_batches(task.first_step), task.workload)
            if turns:
                turns.load_s = load_s
            begin = turns.begin if turns else _anew
            report = train_head(head, adapters, batches, tail, task.training, task.first_step, optimizer, begin)
        trained = TrainedHead(
            client=task.client,
            factors=adapters.factors(),
            importance={name: report.importance[name] for name in head.linear_modules() if report.importance},
            tokens=report.tokens,
            loss=float(np.mean(report.losses)),
            seconds=turns.seconds(report.compute_s)
            if turns
            else {"load": load_s, "compute": report.compute_s, "exchange": report.exchange_s},
            kept_from=0 if start is None else task.kept_from,
        ).since(start or {})
        self._deltas.keep_own(task.run, task.client, OwnFactors(task.round, trained.factors))
        if task.training.keep_adapters:
            from hsplit_flwr.training.kept_adapters import KeptAdapters  # who keeps nothing does not need it

            self._deltas.keep_adapters(task.run, task.client, KeptAdapters.of(task.round, adapters, optimizer))
        return trained

    def score(self, task: RoundTask, budget: Budget | None = None, turns: RoundInTurns | None = None) -> Score:
        """Loss of the client's held-out batches: head here, tail on the server, no gradients.

        Args:
            task, budget, turns: see `train`.

        Raises:
            ConfigError: a head beyond `budget`, or data that does not fit the task.
            ExchangeError, Suspended: as `train`.
        """
        self._require_same_base(task)
        if reason := self._refusal(task, budget):
            raise ConfigError(reason)
        head = self._load_head(task)
        with self._open_tail(task, head, turns) as tail:
            self._update_weights(task, head, tail, turns, {})
            batches = _bounded(self._data(task.client).evaluate, task.workload)
            reply = turns.score(head, batches, tail) if turns else score_head(head, batches, tail)
        return Score(reply.nll, reply.tokens)

    def _require_same_base(self, task: RoundTask) -> None:
        """Adapters that are trained on one base are none for another."""
        held = self._files.quantization.method if self._files.quantization else PLAIN
        if task.workload and task.workload.quantization != held:
            raise ConfigError(
                f"Expected a base with quantization = {task.workload.quantization!r}, as the server holds it, found "
                f"{held!r} at client {task.client}. Give server and clients the same quantization."
            )

    def _go_on(self, task: RoundTask, adapters: SegmentAdapters, optimizer: Optimizer) -> dict[str, LoraFactors] | None:
        """Go on with the adapters that the server has of this client; returns those; None where all restart."""
        kept = self._deltas.kept_adapters(task.run, task.client, task.kept_from) if task.kept_from else None
        return kept.resume(adapters, optimizer) if kept else None

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

    def _load_head(self, task: RoundTask) -> Segment:
        head = load_segment(self._files, 0, task.plan.cut, dtype=self._dtype, device=self._device)
        head.gradient_checkpointing = bool(task.workload and task.workload.gradient_checkpointing)
        return head

    def _open_tail(self, task: RoundTask, head: Segment, turns: RoundInTurns | None) -> RemoteTail:
        dense = [dense_bytes(shape) for shape in linear_shapes(head).values()]
        frame_bytes = max(task.max_frame_bytes, max(dense) + _FRAME_MARGIN_BYTES)
        connect = turns.connect if turns else self._connect
        return RemoteTail(task, frame_bytes, connect, max_delta_bytes=sum(dense))

    def _update_weights(
        self,
        task: RoundTask,
        head: Segment,
        tail: RemoteTail,
        turns: RoundInTurns | None,
        brought: Mapping[str, LoraFactors],
    ) -> None:
        """The newest weights, without what adapters bring that go on."""
        shapes = linear_shapes(head)
        with self._deltas.open(task.run, task.client, shapes) as replica:
            if turns and turns.version is not None:
                turns.expect_version(replica.version)
            else:
                _fetch(tail, replica, shapes)
            merge_beneath(head, self._files, replica.total, brought, replica.total.names())
        if turns:
            turns.fetched(replica.version)


def _fetch(tail: RemoteTail, replica: DeltaReplica, shapes: Shapes) -> None:
    """Bring `replica` to the server's version."""
    have = replica.version or 0
    own = replica.own.round_number if replica.own else 0
    version, whole, tensors = tail.fetch_delta(have, replica.total.place.aside, own)
    base = None if whole else have
    replica.apply(DeltaUpdate.from_tensors(tensors, shapes, base=base, version=version), shapes)


def _anew(training: HeadTraining) -> None:
    """Begin at the round's first step."""


@lru_cache(maxsize=4)
def _model_costs(model: str, workload: Workload) -> "ModelCosts":
    from hsplit_flwr.planning.costs.model_costs import ModelCosts  # only a client with a budget needs it

    return ModelCosts(ModelFiles.resolve(model).config, workload)


def _bounded(batches: Iterable[Batch], workload: Workload | None) -> Iterator[Batch]:
    """`batches`, none larger than the plan was made for: a larger one would take memory that nobody granted."""
    for batch in batches:
        rows, width = batch["labels"].shape
        if workload and (rows > workload.batch_size or width > workload.sequence_length):
            raise ConfigError(
                f"Expected batches of at most {workload.batch_size} x {workload.sequence_length} tokens, as the plan "
                f"was made for, found {rows} x {width}. Raise the strategy's workload (batch-size, max-length), or use "
                "smaller batches."
            )
        yield batch
