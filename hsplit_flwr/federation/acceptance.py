"""Which trained heads a round takes: those of clients that did all their steps and sent what they were asked for."""

from collections.abc import Mapping
from typing import NamedTuple

from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.common.tables import describe_ranks
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.task_limits import LONGEST_S
from hsplit_flwr.federation.handed_in import HandedIn
from hsplit_flwr.federation.trained_head import HeadReply, Refusal, Shapes, TrainedHead, read_trained
from hsplit_flwr.reports.records import CLIENT_PHASES, ClientRecord
from hsplit_flwr.training.config import ClientPlan

LARGEST_LOSS = 1e6
"""nats per token: who knows nothing loses the logarithm of the vocabulary, about 12"""
MOST_TOKENS = 10**12
"""of a client in a round"""
Replies = Mapping[str, HeadReply | Refusal]
"""client id -> what it sent back"""


class Expected(NamedTuple):
    """What a client was asked for."""

    plan: ClientPlan
    head_shapes: Shapes
    """the linear layers of its head, in the order of the model"""


class Accepted(NamedTuple):
    """What a client that finished its round brought, and what the tail counted of it."""

    trained: TrainedHead
    ticket: Ticket

    def record(self) -> ClientRecord:
        """A client's round, as far as possible from what the tail itself counted; its seconds are its own word."""
        trained, ticket = self
        ranks = [factors.rank for factors in trained.adapters.values()]
        return ClientRecord(
            client_id=ticket.client,
            cut=ticket.cut,
            ranks=describe_ranks(ranks),
            mean_rank=sum(ranks) / max(1, len(ranks)),
            tokens=ticket.tokens,
            steps=ticket.steps,
            loss=ticket.nll / ticket.tokens if ticket.tokens else None,
            bytes_up=ticket.bytes_up + trained.upload_bytes,
            bytes_down=ticket.bytes_down,
            seconds={phase: trained.seconds.get(phase, 0.0) for phase in CLIENT_PHASES},
            held_s=ticket.held_s,
        )


def accept(
    replies: Replies,
    tickets: Mapping[str, Ticket],
    expected: Mapping[str, Expected],
    steps: int,
    handed_in: HandedIn | None = None,
) -> tuple[dict[str, Accepted], list[str]]:
    """The clients that did all their `steps` and sent usable adapters, by id, and why others are left out.

    With `handed_in` adapters may go on from those, and what training changed in them is what is brought.
    """
    accepted, refused = {}, []
    for client, reply in replies.items():
        try:
            accepted[client] = Accepted(
                _checked(client, reply, tickets[client], expected[client], steps, handed_in), tickets[client]
            )
        except Exception as error:  # whatever a client sends must not stop the run
            refused.append(describe_failure(client, f"{type(error).__name__}: {error}"))
    return dict(sorted(accepted.items())), refused


def tokens_of(accepted: Mapping[str, Accepted]) -> int:
    """Target tokens that the tail counted of them all."""
    return sum(done.ticket.tokens for done in accepted.values())


def _checked(
    client: str,
    reply: HeadReply | Refusal,
    ticket: Ticket,
    expected: Expected,
    steps: int,
    handed_in: HandedIn | None,
) -> TrainedHead:
    if isinstance(reply, Refusal):
        raise AggregationError(f"refused: {reply.reason}")
    if ticket.steps != steps:
        raise AggregationError(f"Expected {steps} steps at the tail, found {ticket.steps}.")
    _check_figures(reply)
    trained = read_trained(reply, client, expected.plan, expected.head_shapes)
    return trained.since(handed_in.adapters(client, trained.kept_from)) if handed_in else trained


def _check_figures(reply: HeadReply) -> None:
    """Refuse figures that no honest client reports: they would end in tables, plans and pictures."""
    limits: dict[str, tuple[float, float]] = {"tokens": (reply.tokens, MOST_TOKENS), "loss": (reply.loss, LARGEST_LOSS)}
    limits |= {f"{phase}_s": (reply.seconds.get(phase, 0.0), LONGEST_S) for phase in CLIENT_PHASES}
    for name, (found, most) in limits.items():
        if not 0 <= found <= most:
            raise AggregationError(f"Expected {name} of a trained head in 0..{most:g}, found {found:g}.")
