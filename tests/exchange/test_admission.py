"""Tokens and tickets: who comes in, once, and what is left when the round closes. No transport."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.admission import Admission, Ticket
from hsplit_flwr.training.workload import Workload

pytestmark = pytest.mark.timeout(20)


class Visitor:
    """A `Caller` that notes whether it was shown out."""

    def __init__(self, token: str, seconds_left: float = 60.0) -> None:
        self.token = token
        self.seconds_left = seconds_left
        self.ended = 0

    def on_gone(self, action: Callable[[], object]) -> None:
        """Never gone."""

    def end(self) -> None:
        self.ended += 1


def refused(admission: Admission, visitor: Visitor) -> str:
    with pytest.raises(ExchangeError, match="Expected") as refusal, admission.admit(visitor):
        pass
    assert visitor.token not in str(refusal.value) or not visitor.token
    return refusal.value.code


def test_a_token_leads_to_its_clients_ticket() -> None:
    admission = Admission()
    workload = Workload(2, 8)
    tokens = admission.open_round(3, "train", {"a": 1, "b": 2}, 40, steps=20, workload=workload)
    assert len({*tokens.values()}) == 2
    assert all(len(token) >= 43 for token in tokens.values())  # 256 bits
    with admission.admit(Visitor(tokens["b"])) as ticket:
        expected = Ticket(
            client="b", round=3, mode="train", cut=2, first_step=40, max_steps=20, workload=workload, used=True
        )
        assert ticket == expected
        ticket.count(6.0, 3)
        ticket.count(1.0, 2)
    tickets = admission.close_round()
    assert tickets["b"] is ticket
    assert (ticket.steps, ticket.nll, ticket.tokens) == (2, 7.0, 5)
    assert (tickets["a"].used, tickets["a"].steps) == (False, 0)


def test_a_ticket_knows_whether_its_head_trains() -> None:
    admission = Admission()
    tokens = admission.open_round(1, "train", {"a": 1, "b": 2}, 0, ["b"])
    for client, trains in (("a", True), ("b", False)):
        with admission.admit(Visitor(tokens[client])) as ticket:
            assert ticket.trains is trains


def test_without_limits_a_ticket_has_none() -> None:
    admission = Admission()
    (token,) = admission.open_round(1, "evaluate", {"a": 1}, 0).values()
    with admission.admit(Visitor(token)) as ticket:
        assert (ticket.max_steps, ticket.workload) == (None, None)


def test_who_does_not_come_in() -> None:
    admission = Admission()
    assert refused(admission, Visitor("")) == "unauthenticated"
    tokens = admission.open_round(1, "train", {"a": 1}, 0)
    assert refused(admission, Visitor("x" * 43)) == "unauthenticated"
    assert refused(admission, Visitor("")) == "unauthenticated"
    for forever in (math.inf, 9e18):
        assert refused(admission, Visitor(tokens["a"], forever)) == "no_deadline"
    with admission.admit(Visitor(tokens["a"])):  # forgetting a deadline did not cost the token
        assert refused(admission, Visitor(tokens["a"])) == "unauthenticated"
    assert refused(admission, Visitor(tokens["a"])) == "unauthenticated"


@pytest.mark.parametrize("end", ["next round", "close"])
def test_tokens_are_void_after_their_round(end: str) -> None:
    admission = Admission()
    tokens = admission.open_round(1, "train", {"a": 1}, 0)
    probe = admission.open_probe("node", 1)
    if end == "close":
        admission.close_round()
    else:
        admission.open_round(2, "train", {"a": 1}, 20)
    assert refused(admission, Visitor(tokens["a"])) == "unauthenticated"
    assert refused(admission, Visitor(probe)) == "unauthenticated"


def test_a_probe_is_admitted_beside_an_open_round() -> None:
    admission = Admission()
    tokens = admission.open_round(1, "train", {"a": 1}, 0)
    probe = admission.open_probe("node", 2)
    with admission.admit(Visitor(probe)) as ticket, admission.admit(Visitor(tokens["a"])):
        assert (ticket.client, ticket.mode, ticket.round) == ("node", "probe", 2)


def test_closing_a_round_ends_the_streams_that_are_still_open() -> None:
    admission = Admission()
    tokens = admission.open_round(1, "train", {"here": 1, "gone": 1, "failed": 1, "absent": 1}, 0)
    here, gone, failed, thief = (Visitor(tokens[name]) for name in ("here", "gone", "failed", "here"))
    with ExitStack() as stack:
        stack.enter_context(admission.admit(here))
        with admission.admit(gone):
            pass
        with pytest.raises(RuntimeError, match="in its stream"), admission.admit(failed):
            raise RuntimeError("in its stream")
        assert refused(admission, thief) == "unauthenticated"  # and does not get `here` out of the books
        assert admission.close_round().keys() == tokens.keys()
        assert [visitor.ended for visitor in (here, gone, failed, thief)] == [1, 0, 0, 0]
    assert admission.close_round() == {}
    assert here.ended == 1


def test_of_many_at_once_with_one_token_one_comes_in() -> None:
    admission = Admission()
    clients = 20
    tokens = admission.open_round(1, "train", {str(number): 1 for number in range(clients)}, 0)
    tries = 8
    start = threading.Barrier(tries)

    def try_all(number: int) -> list[str]:
        start.wait(10)
        let_in = []
        for client, token in tokens.items():
            try:
                with admission.admit(Visitor(token)) as ticket:
                    let_in.append(ticket.client)
                    assert ticket.client == client
            except ExchangeError:
                pass
        return let_in

    with ThreadPoolExecutor(tries) as pool:
        let_in = sorted(client for found in pool.map(try_all, range(tries)) for client in found)
    assert let_in == sorted(tokens)
