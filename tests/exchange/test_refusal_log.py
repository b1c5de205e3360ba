"""Who is refused can try again at once, thousands of times: the log and the books of a client stay small."""

import logging

import pytest

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.admission import MOST_ERRORS, Ticket
from hsplit_flwr.exchange.refusal_log import LINES, WINDOW_S, RefusalLog

ERROR = ExchangeError("unauthenticated", "Expected an unused token, found another.")


def test_a_flood_of_refusals_is_counted_and_not_written(caplog: pytest.LogCaptureFixture) -> None:
    """A stranger without a token wrote a line into the server's log by each of its streams, some 500 a second."""
    caplog.set_level(logging.WARNING, "hsplit_flwr")
    now = [0.0]
    log = RefusalLog(lambda: now[0])
    for _ in range(5000):
        log.note("an unknown client", ERROR)
    log.note("client 7", ERROR)  # of whom the flood must not hide anything
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"tail: refused an unknown client: {ERROR}"] * LINES + [f"tail: refused client 7: {ERROR}"]
    caplog.clear()
    now[0] = WINDOW_S
    log.note("client 7", ERROR)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"tail: refused an unknown client {5000 - LINES} times more within 60 s",
        f"tail: refused client 7: {ERROR}",
    ]


def test_a_clients_books_keep_its_first_refusals() -> None:
    ticket = Ticket(client="7", round=1, mode="train", cut=1, first_step=0)
    for number in range(100_000):
        ticket.note_refusal(f"[code] number {number}")
    assert ticket.errors == [f"[code] number {number}" for number in range(MOST_ERRORS)]
