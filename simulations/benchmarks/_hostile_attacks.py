"""The attacks of `hostile.py` on the wire: each has an address and the tokens of admitted clients, and a tally."""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import grpc
import torch
from _faults_links import Links
from _hostile_frames import Judge, Mutants
from _hostile_server import HONEST, MAX_FRAME_BYTES, ROWS, STEPS, WIDTH
from _hostile_wire import Attacker, Tally, batch, header, hello, train_frame

from hsplit_flwr.exchange.batches import batch_tensors
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import encode
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE

Tokens = Mapping[str, str]
Attack = Callable[[str, Tokens, Tally, int], None]
"""(address, client -> its token, what became of it, seed)"""
THREADS = 4
CONNECTIONS = 2000
MUTE_STREAMS = 400
RETURNS = 1000
HELD_S = 6.0
"""how long floods last"""
DRIP_BYTES_PER_S = 200.0


def mutated(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """A wrong frame of every client: every fifth in place of its hello, the others of its first step."""

    def attack(part: int, clients: list[str]) -> None:
        with Attacker(address) as attacker:
            for number, client in enumerate(clients):
                greets = number % 5 == 0
                right = hello(client) if greets else train_frame(client)
                kind, frame = Mutants(right, Judge(right, VOCAB_SIZE), seed * 1_000_003 + part * 10_007 + number).next()
                said = attacker.say(tokens[client], [frame] if greets else [hello(client), frame], 0 if greets else 1)
                tally.note(f"{kind} of {'hello' if greets else 'train'}: {frame[:900]!r}", said)

    clients = list(tokens)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(attack, part, clients[part::THREADS]) for part in range(THREADS)]:
            done.result()


def connections(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """Connections that say nothing."""
    host, _, port = address.rpartition(":")
    with ExitStack() as opened:
        for _ in range(CONNECTIONS):
            try:
                opened.enter_context(socket.create_connection((host, int(port)), 5.0))
                tally.note("", "open")
            except OSError as error:
                tally.note("", type(error).__name__)
        time.sleep(HELD_S)


def mute_streams(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """Streams that say nothing: of every admitted client, and of as many strangers."""
    quiet = threading.Event()

    def nothing() -> Any:
        quiet.wait(HELD_S)
        yield from ()

    def hold(attacker: Attacker, token: str) -> None:
        try:
            answers = list(attacker.stream(token, nothing()))
            tally.note("", "accepted" if answers else "ended")
        except grpc.RpcError as error:
            tally.note("", str(error.details())[1:].split("]")[0][:40])

    with Attacker(address) as attacker, ThreadPoolExecutor(MUTE_STREAMS) as pool:
        held = [*tokens.values(), *("x" * 43 for _ in tokens)]
        for done in [pool.submit(hold, attacker, token) for token in held]:
            done.result()


def slow_frames(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """Frames that come byte by byte, for as long as a flood lasts."""
    port = int(address.rpartition(":")[2])
    with Links(1, port, port, lambda _: 0) as links, ExitStack() as opened, ThreadPoolExecutor(len(tokens)) as pool:
        attackers = {client: opened.enter_context(Attacker(links.superlink_address(0))) for client in tokens}

        def drip(client: str) -> None:
            with suppress(grpc.RpcError):
                frames = [hello(client), train_frame(client)]
                answers = list(attackers[client].stream(tokens[client], frames, HELD_S))
                tally.note(client, "accepted" if len(answers) > 1 else "ended")
                return
            tally.note(client, "given up")

        links.limit([0], DRIP_BYTES_PER_S)
        for done in [pool.submit(drip, client) for client in tokens]:
            done.result()


def oversized(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """More than was planned: rows, width, steps, bytes; and a small frame that says it is a large batch."""

    def tall(client: str) -> list[bytes]:
        activations, mask, labels = (tensor.repeat(ROWS, *([1] * (tensor.ndim - 1))) for tensor in batch(client, 0))
        return [encode(header("train", client), batch_tensors(activations, mask, labels, CODECS["fp32"]))]

    def wide(client: str) -> list[bytes]:
        activations, mask, labels = (torch.cat([tensor, tensor], 1) for tensor in batch(client, 0))
        return [encode(header("train", client), batch_tensors(activations, mask, labels, CODECS["fp32"]))]

    def large(client: str) -> list[bytes]:
        return [train_frame(client, activations=torch.zeros(2 * MAX_FRAME_BYTES // (4 * HIDDEN_SIZE), HIDDEN_SIZE))]

    def hollow(client: str) -> list[bytes]:
        return [train_frame(client, size=torch.tensor([ROWS, 2**31 - 1], dtype=torch.int32))]

    def narrow_but_many(client: str) -> list[bytes]:
        return [train_frame(client, size=torch.tensor([2**31 - 1, WIDTH], dtype=torch.int32))]

    makers = (tall, wide, large, hollow, narrow_but_many)
    with Attacker(address) as attacker:
        for number, client in enumerate(tokens):
            make = makers[number % len(makers)]
            tally.note(f"{make.__name__}", attacker.say(tokens[client], [hello(client), *make(client)], 1))


def refused_again(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """Clients that were refused, and come back with their keys as often as they can."""
    with Attacker(address) as attacker:
        for client, token in tokens.items():
            own = f"{token}.{'k' * 43}"
            for _ in range(RETURNS):
                tally.note("back again", attacker.say(own, [hello(client), train_frame(client, STEPS)], 1))


def too_many_steps(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """A step of a number beyond the round's, as the first."""
    with Attacker(address) as attacker:
        for client in tokens:
            frames = [hello(client), train_frame(client, STEPS)]
            tally.note("a step too many", attacker.say(tokens[client], frames, 1))


def stolen_names(address: str, tokens: Tokens, tally: Tally, seed: int, *, honest_token: str) -> None:
    """Identity theft: the honest client's token, its name under another token, invented tokens and keys."""
    with Attacker(address) as attacker:
        for number, (client, token) in enumerate(tokens.items()):
            match number % 4:
                case 0:
                    said = attacker.say(honest_token, [hello(HONEST), train_frame(HONEST, 1)], 0)
                case 1:
                    said = attacker.say(f"{honest_token}.{'k' * 43}", [hello(HONEST), train_frame(HONEST, 1)], 0)
                case 2:
                    said = attacker.say(token, [hello(client), train_frame(HONEST, 1)], 1)
                case _:
                    said = attacker.say("t" * 43, [hello(HONEST), train_frame(HONEST, 1)], 0)
            tally.note(f"theft {number % 4}", said)


def peace(address: str, tokens: Tokens, tally: Tally, seed: int) -> None:
    """Nobody attacks."""


MUTATED = "mutated frames"
CLIENTS: Mapping[str, int] = {
    "connections": 0,
    "mute streams": MUTE_STREAMS // 2,
    "slow frames": 20,
    "oversized work": 200,
    "steps beyond the round": 200,
    "refused, and back": 5,
    "identity theft": 200,
}
"""attack -> clients of the attacker's that are admitted for it"""
NEED_A_VICTIM = ("identity theft",)
"""attacks on a client that is there"""


def attacks(honest_token: str) -> Mapping[str, Attack]:
    """All of them by name."""
    return {
        MUTATED: mutated,
        "connections": connections,
        "mute streams": mute_streams,
        "slow frames": slow_frames,
        "oversized work": oversized,
        "steps beyond the round": too_many_steps,
        "refused, and back": refused_again,
        "identity theft": partial(stolen_names, honest_token=honest_token),
    }
