"""Turns: who speaks when, with a tail of this file's own behind a conversation; no model, no Flower."""

import threading
import time
from collections.abc import Iterator

import pytest

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import message_transport
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.message_transport import Conversation, connect, converse
from hsplit_flwr.exchange.transport import Caller, Serve, transport_of
from hsplit_flwr.exchange.turns import MESSAGE_BYTES, MOST_FRAMES, Suspended, Turn, TurnStream, digest, in_turns

pytestmark = pytest.mark.timeout(20)

SOON_S = 5.0


def conversation(serve: Serve, limit_s: float = 60.0) -> Conversation:
    listener = transport_of("messages://").listen(serve, ServiceConfig(bind="messages://"))
    listener.start()
    assert in_turns(listener.address)
    talk = converse(listener.address, "token", limit_s)
    listener.stop()
    with pytest.raises(ExchangeError, match=r"\[tail_unreachable\] Expected a tail at messages://"):
        converse(listener.address, "token", limit_s)
    return talk


def twice(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
    """Two frames for each one."""
    assert caller.token == "token"
    for frame in frames:
        yield frame + b"1"
        yield frame + b"2"


def test_the_tail_says_all_that_it_can_before_the_head_has_its_turn() -> None:
    talk = conversation(twice)
    assert talk.turn() is None
    talk.say(1, [b"a", b"b"])
    assert talk.turn(SOON_S) == Turn(2, [b"a1", b"a2", b"b1", b"b2"])
    talk.say(2, [b"c"])
    assert talk.turn(SOON_S) == Turn(3, [b"c1", b"c2"])
    talk.end()
    with pytest.raises(ExchangeError, match="round_closed"):
        talk.turn(SOON_S)


def test_what_is_more_than_a_message_holds_comes_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_transport, "MESSAGE_BYTES", 5)
    talk = conversation(twice)
    talk.say(1, [b"aaa", b"b"])
    assert talk.turn(SOON_S) == Turn(2, [b"aaa1"], more=True)
    talk.say(2, [])
    assert talk.turn(SOON_S) == Turn(3, [b"aaa2"], more=True)
    talk.say(3, [])
    assert talk.turn(SOON_S) == Turn(4, [b"b1", b"b2"])


def test_who_does_not_hear_the_tail_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_transport, "MESSAGE_BYTES", 5)
    talk = conversation(twice)
    talk.say(1, [b"aaa"])
    assert talk.turn(SOON_S)
    talk.say(2, [b"b"])
    with pytest.raises(ExchangeError, match=r"\[malformed_frame\] Expected to be heard out, found 1 frames"):
        talk.turn(SOON_S)


def test_only_the_turn_that_is_due_is_answered() -> None:
    talk = conversation(twice)
    with pytest.raises(ExchangeError, match=r"\[wrong_turn\] Expected the answer to turn 1, found that to 2"):
        talk.say(2, [b"a"])
    with pytest.raises(ExchangeError, match=rf"Expected at most {MOST_FRAMES} frames in a message"):
        talk.say(1, [b""] * (MOST_FRAMES + 1))
    talk.say(1, [])
    with pytest.raises(ExchangeError, match=r"\[malformed_frame\] Expected frames in a client's message"):
        talk.turn(SOON_S)


def test_who_ends_a_conversation_ends_the_tails_wait() -> None:
    """As where a stream breaks: whoever waits for the client's step is told, from whatever thread."""
    gone, over = threading.Event(), threading.Event()

    def waits(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        caller.on_gone(gone.set)
        for _ in frames:
            assert gone.wait(SOON_S)
            yield b"too late"
        over.set()

    talk = conversation(waits)
    talk.say(1, [b"a"])
    talk.end()
    assert over.wait(SOON_S)
    after = threading.Event()
    talk.on_gone(after.set)
    assert after.is_set()


def test_a_conversation_does_not_last_longer_than_its_limit() -> None:
    over = threading.Event()

    def listens(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        yield from frames
        over.set()

    started = time.monotonic()
    conversation(listens, limit_s=0.2)
    assert over.wait(SOON_S)
    assert time.monotonic() - started < SOON_S


def test_a_tail_that_fails_says_so() -> None:
    def fails(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        yield from frames
        raise RuntimeError("no memory")

    talk = conversation(lambda caller, frames: fails(caller, iter(())))
    with pytest.raises(ExchangeError, match=r"\[tail_failed\] .*no memory"):
        talk.turn(SOON_S)


def test_nobody_connects_to_it() -> None:
    with pytest.raises(ExchangeError, match=r"\[tail_unreachable\] .*State what the node can afford"):
        connect("messages://1", "token", 1.0, 1)


# --- the head's end ---


def test_what_was_said_is_not_said_twice_and_must_be_the_same() -> None:
    stream = TurnStream([b"answer"], [digest(b"a")])
    stream.send(b"a")
    assert stream.receive() == b"answer"
    stream.send(b"b")
    assert stream.said == [b"b"]
    with pytest.raises(Suspended):
        stream.receive()
    with pytest.raises(ExchangeError, match="not_repeatable"):
        TurnStream([b"answer"], [digest(b"a")]).send(b"A")


def test_a_message_is_full_where_the_next_frame_might_not_fit() -> None:
    stream = TurnStream([])
    assert stream.has_room
    stream.send(bytes(MESSAGE_BYTES // 2 - 1))
    assert stream.has_room
    stream.send(bytes(1))
    assert stream.has_room
    stream.send(bytes(2))
    assert not stream.has_room
