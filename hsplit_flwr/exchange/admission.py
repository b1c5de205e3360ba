"""Who may take part in a round: one-time tokens, and what each client did with its own.

Whoever uses a token first owns it. It may add a key of its own making to it (``token.key``), and only who shows that
key may use the token again, to come back after its connection broke: at any time, since the tail may not have noticed.
"""

import secrets
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.stay import Stay
from hsplit_flwr.exchange.task import Mode
from hsplit_flwr.exchange.task_limits import LONGEST_S
from hsplit_flwr.exchange.transport import Caller
from hsplit_flwr.training.workload import Workload

MOST_ERRORS = 10
"""that are kept of a client"""


@dataclass(kw_only=True)
class Ticket:
    """One client's admission to one round: what it may do there, and what it did."""

    client: str
    round: int
    mode: Mode
    cut: int
    first_step: int
    trains: bool = True
    """its head has adapters, by the plan"""
    max_steps: int | None = None
    """steps of the round; None: any number"""
    workload: Workload | None = None
    """the largest batch that was planned; None: any"""
    bytes_up: int = 0
    bytes_down: int = 0
    delta_bytes: int = 0
    """of `bytes_down`: the weight delta"""
    used: bool = False
    steps: int = 0
    """that were answered to their last part"""
    step_rows: int = 0
    """rows of the step under way that came so far"""
    tokens: int = 0
    """target tokens that the tail itself counted"""
    nll: float = 0.0
    """summed loss of those tokens, nats"""
    held_s: float = 0.0
    """seconds that the tail had its batches: it computed, or others had their turn"""
    errors: list[str] = field(default_factory=list)
    """why it was refused, the first times"""
    key: str = field(default="", repr=False, compare=False)
    """what its owner added to the token; empty: it does not come back"""
    stay: Stay = field(init=False, repr=False, compare=False)
    """what outlives its streams"""

    def __post_init__(self) -> None:
        self.stay = Stay(self.client)

    def note_refusal(self, error: str) -> None:
        """Note why a stream of the client's was refused; it may come again as often as it likes."""
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)

    def count(self, nll: float, tokens: int, *, ends_step: bool = True) -> None:
        """Note a step that was answered, or a part of it."""
        self.steps += ends_step
        self.nll += nll
        self.tokens += tokens


class Admission:
    """The tokens of the open round, and the streams that were let in with them. Safe to use from many threads.

    Args:
        returns: clients may come back after their connections broke.
    """

    def __init__(self, *, returns: bool = True) -> None:
        self._returns = returns
        self._lock = threading.Lock()
        self._tickets: dict[str, Ticket] = {}
        self._callers: dict[str, Caller] = {}

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
        """Admit the clients of a round; returns each one's one-time token. Earlier tokens are void.

        Args:
            round_number: counted from 1.
            mode: what its frames are.
            cuts: client -> blocks of its head.
            first_step: run step of the round's first.
            frozen: clients whose heads train nothing.
            steps: that each client may take; None: any number.
            workload: whose batches it may send; None: any size.
        """
        tokens = {client: secrets.token_urlsafe(32) for client in cuts}
        tickets = {
            tokens[client]: Ticket(
                client=client,
                round=round_number,
                mode=mode,
                cut=cut,
                first_step=first_step,
                trains=client not in frozen,
                max_steps=steps,
                workload=workload,
            )
            for client, cut in cuts.items()
        }
        with self._lock:
            self._tickets = tickets
        return tokens

    def open_probe(self, node: str, round_number: int) -> str:
        """Admit a node that measures its link, until round `round_number` opens; returns its one-time token."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._tickets[token] = Ticket(client=node, round=round_number, mode="probe", cut=1, first_step=0)
        return token

    def close_round(self) -> dict[str, Ticket]:
        """Void the tokens and end the streams that are still open; returns what each client did."""
        with self._lock:
            tickets, self._tickets = self._tickets, {}
            callers = list(self._callers.values())
        for caller in callers:
            caller.end()
        for ticket in tickets.values():
            ticket.stay.end()
        return {ticket.client: ticket for ticket in tickets.values()}

    def hears_of(self, client: str) -> bool:
        """Whether a stream of `client` is in the books."""
        with self._lock:
            return any(self._tickets[token].client == client for token in self._callers if token in self._tickets)

    def answered(self, client: str) -> None:
        """`client` is done with its task: if its connection is broken, it will not come back."""
        with self._lock:
            stays = [ticket.stay for ticket in self._tickets.values() if ticket.client == client]
        for stay in stays:
            if stay.is_away:
                stay.end()

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[Ticket]:
        """The ticket of `caller`, whose stream is in the books until the end of the ``with`` block.

        Raises:
            ExchangeError: ``unauthenticated`` or ``no_deadline``; the latter leaves the token good.
        """
        token, _, key = caller.token.partition(".")
        with self._lock:
            ticket = self._tickets.get(token)
            if ticket is None or (ticket.used and not self._is_back(ticket, key)):
                found = "a used one" if ticket else "an unknown one"
                raise ExchangeError(
                    "unauthenticated", f"Expected an unused token of the open round, found {found}. Ask for a new task."
                )
            if caller.seconds_left > LONGEST_S:  # none was set: gRPC's books show 9e18 s
                raise ExchangeError("no_deadline", "Expected a deadline on the stream, found none. Set a timeout.")
            ticket.used, ticket.key = True, key
            replaced = self._callers.get(token)
            self._callers[token] = caller
        if replaced:
            replaced.end()
        try:
            yield ticket
        finally:
            with self._lock:
                if self._callers.get(token) is caller:
                    del self._callers[token]

    def _is_back(self, ticket: Ticket, key: str) -> bool:
        """Whether `key` is that of the ticket's owner."""
        return self._returns and bool(key) and secrets.compare_digest(key.encode(), ticket.key.encode())
