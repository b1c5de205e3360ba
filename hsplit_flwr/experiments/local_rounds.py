"""A server's rounds without a network: everybody is there, and heads meet the tail in one process."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.planning.budgets.budget import Budget
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
    """Leads straight to `tail`. See `round_server.Door`."""

    address = "in this process"

    def __init__(self, tail: SharedTail) -> None:
        self._tail = tail
        self._tickets: dict[str, Ticket] = {}

    def open_round(
        self,
        round_number: int,
        mode: Mode,
        cuts: Mapping[str, int],
        first_step: int,
        *,
        steps: int | None = None,
        workload: Workload | None = None,
    ) -> dict[str, str]:
        """Admit the clients of `cuts`; nobody needs a token."""
        self._tickets = {
            client: Ticket(client=client, round=round_number, mode=mode, cut=cut, first_step=first_step)
            for client, cut in cuts.items()
        }
        return dict.fromkeys(cuts, "")

    def open_probe(self, node: str, round_number: int) -> str:
        """Nobody measures a link here: devices are stated."""
        return ""

    def enter(self, task: RoundTask) -> TailSession:
        """A session of the task's client in the open training round."""
        ticket = self._tickets[task.client]
        return _CountedSession(self._tail.join(task.client, ticket.cut, ticket.first_step), ticket)

    def close_round(self) -> dict[str, Ticket]:
        """End the round; returns what each client did."""
        tickets, self._tickets = self._tickets, {}
        return tickets

    def stop(self) -> None:
        """Let nobody in any more."""
        self._tickets = {}


class _CountedSession(TailSession):
    """`session`, whose steps, tokens and losses are noted on `ticket`."""

    def __init__(self, session: TailSession, ticket: Ticket) -> None:
        self._session = session
        self._ticket = ticket
        self._unanswered: deque[BatchPart] = deque()

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        self._session.send_part(part, activations, attention_mask, labels)
        self._unanswered.append(part)

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        reply = self._session.receive_part()
        self._ticket.count(reply.loss * reply.tokens, reply.tokens, ends_step=self._unanswered.popleft().is_last)
        return reply

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        return self._session.score_step(step, activations, attention_mask, labels)

    def close(self) -> None:
        """See `TailSession`."""
        self._session.close()
