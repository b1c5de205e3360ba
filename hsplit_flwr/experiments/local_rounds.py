"""A server's rounds without a network: everybody is there, and heads meet the tail in one process."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.batches import batch_tensors, check_batch, check_gradient, gradient_tensors
from hsplit_flwr.exchange.codecs import codec_named
from hsplit_flwr.exchange.frames import Header, rounding_seed
from hsplit_flwr.exchange.positions import traveling
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.exchange.traffic import Traffic
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload


@dataclass(frozen=True)
class Everyone:
    """The clients of a round, all at the same time. See `roster.Present`."""

    clients: Collection[str]
    new_budgets: Mapping[str, Budget]
    """client id -> its device"""

    def concurrency(self, clients: Iterable[str]) -> int:
        """All of `clients`."""
        return len(list(clients))

    def count_nodes(self, clients: Iterable[str]) -> int:
        """One: this process."""
        return 1


class LocalDoor:
    """Leads straight to `tail`; what travels is packed and unpacked as on the wire. See `round_server.Door`.

    Args:
        tail: trains and scores.
        training: its codecs.
        workload: the largest batches.
    """

    address = "in this process"

    def __init__(self, tail: SharedTail, training: TrainingConfig, workload: Workload) -> None:
        self._tail = tail
        self._workload = workload
        self.exchange_by(training)
        self._tickets: dict[str, Ticket] = {}

    def exchange_by(self, training: TrainingConfig) -> None:
        """Pack and unpack by these settings' codecs."""
        segment = self._tail.segment
        self._wire = _Wire(training, self._workload, segment.hidden_size, segment.vocab_size)

    def open_round(
        self,
        round_number: int,
        mode: Mode,
        cuts: Mapping[str, int],
        first_step: int,
        frozen: Collection[str] = (),
        *,
        steps: int | None = None,
        workload: Workload | None = None,
    ) -> dict[str, str]:
        """Admit the clients of `cuts`; nobody needs a token."""
        self._tickets = {
            client: Ticket(
                client=client,
                round=round_number,
                mode=mode,
                cut=cut,
                first_step=first_step,
                trains=client not in frozen,
            )
            for client, cut in cuts.items()
        }
        return dict.fromkeys(cuts, "")

    def open_probe(self, node: str, round_number: int) -> str:
        """Nobody measures a link here: devices are stated."""
        return ""

    def enter(self, task: RoundTask) -> TailSession:
        """A session of the task's client in the open training round."""
        ticket = self._tickets[task.client]
        session = self._tail.join(task.client, ticket.cut, ticket.first_step, trains=ticket.trains)
        return _WireSession(session, ticket, self._wire)

    holds_clients = True

    @property
    def traffic(self) -> Traffic:
        """Nothing: there is no wire here."""
        return Traffic()

    def hears_of(self, client: str) -> bool:
        """Nobody's connection breaks here."""
        return client in self._tickets

    def answered(self, client: str) -> None:
        """Nobody's connection breaks here."""

    def close_round(self) -> dict[str, Ticket]:
        """End the round; returns what each client did."""
        tickets, self._tickets = self._tickets, {}
        return tickets

    def stop(self) -> None:
        """Let nobody in any more."""
        self._tickets = {}


class _Wire:
    """What becomes of a batch and its gradient between head and tail."""

    def __init__(self, training: TrainingConfig, workload: Workload, hidden_size: int, vocab_size: int) -> None:
        self._up, self._down = codec_named(training.activation_codec), codec_named(training.gradient_codec)
        self._workload = workload
        self._hidden_size, self._vocab_size = hidden_size, vocab_size

    def up(self, header: Header, activations: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A batch as it arrives at the tail."""
        return check_batch(
            batch_tensors(activations, mask, labels, self._up, rounding_seed(header)),
            codec=self._up,
            hidden_size=self._hidden_size,
            vocab_size=self._vocab_size,
            workload=self._workload,
        )

    def down(self, header: Header, gradient: Tensor | None, positions: Tensor) -> Tensor | None:
        """The gradient, if any, as it arrives at the head."""
        if gradient is None:
            return None
        tensors = gradient_tensors(gradient, positions, self._down, rounding_seed(header))
        return check_gradient(tensors, positions, self._hidden_size, self._down)


class _WireSession(TailSession):
    """`session` behind a wire; its steps, tokens and losses are noted on `ticket`."""

    def __init__(self, session: TailSession, ticket: Ticket, wire: _Wire) -> None:
        self._session = session
        self._ticket = ticket
        self._wire = wire
        self._unanswered: deque[tuple[BatchPart, Tensor]] = deque()

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        arrived = self._wire.up(self._header("train", part), activations, attention_mask, labels)
        self._session.send_part(part, *arrived)
        self._unanswered.append((part, traveling(attention_mask, labels)))

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        reply = self._session.receive_part()
        part, positions = self._unanswered.popleft()
        self._ticket.count(reply.loss * reply.tokens, reply.tokens, ends_step=part.is_last)
        return reply._replace(gradient=self._wire.down(self._header("gradient", part), reply.gradient, positions))

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        return self._session.score_step(step, activations, attention_mask, labels)

    def close(self) -> None:
        """See `TailSession`."""
        self._session.close()

    def _header(self, kind: str, part: BatchPart) -> Header:
        ticket = self._ticket
        return Header(kind, "", ticket.round, ticket.client, ticket.cut, step=part.step, part=part.number)
