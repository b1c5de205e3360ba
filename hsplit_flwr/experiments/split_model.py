"""Methods that split the model: a deployment's server and tail, and heads in the same process, without a wire.

Plans, tail, step barrier, aggregation, merging and importance are those of `RoundServer`. What differs by method is how
a round's adapters become weights (`MethodServer`), and whether heads are kept.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from transformers import PreTrainedModel

from hsplit_flwr.errors import RunFailedError
from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.codecs import Part
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.experiments.local_rounds import Everyone, LocalDoor
from hsplit_flwr.experiments.method_server import MethodServer
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.adapted import adapted
from hsplit_flwr.experiments.rivals.corrections import freeze_A
from hsplit_flwr.experiments.split_head import SplitHead
from hsplit_flwr.experiments.split_plans import plans_of
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.experiments.work import RoundOutcome, factor_bytes, merge_flops, split_work
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.trained_head import HeadReply
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.planning.clock import ClientWork
from hsplit_flwr.training.loss import Score, score_segment
from hsplit_flwr.training.tail import SharedTail


class SplitTrainer:
    """See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._method = method
        self.heads: dict[str, SplitHead] = {}
        """client -> its head in the last round"""
        self._kept: dict[str, SplitHead] = {}
        """client -> its last head, where it keeps or carries the adapters of that, also while it is away"""
        plans = plans_of(task, method)
        self._training = replace(task.training, **method.training_settings())
        self.server = MethodServer(
            method,
            self.heads,
            GlobalModel(task.files, device=task.device),
            plans.plans,
            self._training,
            self._open_door,
            tail_lora=plans.tail_lora,
            workload=plans.workload,
        )
        self._versions: dict[str, int] = {}
        """client -> version of the weights that it has"""
        self._trained: dict[str, int] = {}
        """client -> the last round that it trained in"""

    def _open_door(self, tail: SharedTail, *_: object) -> LocalDoor:
        self._door = LocalDoor(tail, self._training, self._task.costs.workload)
        return self._door

    def round(self, round_number: int, present: Sequence[str]) -> RoundOutcome:
        """Plan, train, aggregate."""
        tasks = self.server.open_training(round_number, Everyone(present, self._task.devices))
        self.heads.clear()
        self.heads |= {client: self._head(task) for client, task in tasks.items()}
        replies = self._train(tasks)
        record = self.server.close_training(replies)
        if record.failures:
            raise RunFailedError(f"Expected every client to finish round {round_number}, found: {record.failures}.")
        tokens = sum(reply.tokens for reply in replies.values())
        return RoundOutcome(
            work=tuple(self._work(client, head) for client, head in self.heads.items()),
            tokens=tokens,
            train_loss=sum(reply.tokens * reply.loss for reply in replies.values()) / tokens,
            too_large=sum(self._too_large(client, head) for client, head in self.heads.items()),
            server_flops=merge_flops(self.server.update) + merge_flops(self.server.residual),
        )

    def score(self) -> Score:
        """Score of the global model."""
        carried = self._carried()
        if carried is None:
            return self.server.tail_rounds.score(self._task.eval_batches)
        return score_segment(carried, self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The global model, to generate with."""
        carried = self._carried()
        return carried.model if carried else self.server.tail_rounds.evaluated_model()

    def _carried(self) -> Segment | None:
        """The whole model with the mean of the heads' adapters and the tail's; None where no heads' are carried."""
        if not self.server.average:
            return None
        return adapted(self.server.model, {**self.server.average, **self.server.tail_rounds.unmerged()})

    def _head(self, task: RoundTask) -> SplitHead:
        """The client's head of this round: at the newest weights with fresh adapters, or the one it kept."""
        former = self._kept.get(task.client)
        head = former if former and self._method.keep_optimizers else SplitHead.of(task, self.server.model.segment)
        own = head.adapters.factors()
        carried = {name: self.server.start(name, pair) for name, pair in own.items() if self.server.average}
        if carried:
            head.adapters.set(carried)
        if self._method.frozen_A:
            freeze_A(head.adapters)
        if self._method.keep_heads:
            head.go_on(task, former.kept(self._trained[task.client]) if former else None, self.server.model)
        head.download_bytes = self._lacking_bytes(task) + factor_bytes(carried, frozen_A=self._method.frozen_A)
        if self._method.keep_optimizers or self._method.keep_heads:
            self._kept[task.client] = head
        return head

    def _lacking_bytes(self, task: RoundTask) -> int:
        """Bytes of what the client's weights lack, which it gets now."""
        own = OwnRound(task.client, self._trained.get(task.client, 0))
        version, _, lacking = self.server.model.since(self._versions.get(task.client, 0), task.plan.cut, own)
        self._versions[task.client], self._trained[task.client] = version, task.round
        forms = {key: Part(tuple(tensor.shape), tensor.dtype) for key, tensor in lacking.items()}
        return frame_bytes.delta_bytes(forms) if forms else 0

    def _train(self, tasks: Mapping[str, RoundTask]) -> dict[str, HeadReply]:
        """Every head in a thread of its own. Whoever fails ends the run, once nobody waits for it any more."""

        def train(client: str) -> HeadReply:
            task = tasks[client]
            try:
                session = self._door.enter(task)
                try:
                    return self.heads[client].train(task, self._task.streams[client](task.first_step), session)
                finally:
                    session.close()
            finally:
                self.server.answered(client)

        try:
            with ThreadPoolExecutor(len(tasks)) as pool:
                return dict(zip(tasks, pool.map(train, tasks), strict=True))
        except BaseException:
            self.server.close()
            raise

    def _work(self, client: str, head: SplitHead) -> ClientWork:
        costs = self._task.costs
        frozen = factor_bytes(trained := head.adapters.factors()) - factor_bytes(trained, frozen_A=True)
        return split_work(
            client,
            costs,
            head.plan.cut,
            head.ranks,
            self._tail_ranks(),
            head.forms,
            download_bytes=head.download_bytes,
            upload_bytes=costs.update_bytes(head.plan.cut, head.ranks) - (frozen if self._method.frozen_A else 0),
        )

    def _tail_ranks(self) -> dict[str, int]:
        adapters = self.server.tail_rounds.tail.adapters
        return {name: adapters.parameters([name])[0].shape[0] for name in adapters.module_names}

    def _too_large(self, client: str, head: SplitHead) -> bool:
        needed = self._task.costs.head_memory(head.plan.cut, head.ranks).total_bytes
        return needed > self._task.devices[client].memory_bytes
