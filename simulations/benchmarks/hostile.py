"""What admitted clients and strangers can do to a run: wrong frames, floods, too much work, lies; a row for each.

    python simulations/benchmarks/hostile.py --json OUT
    python simulations/benchmarks/hostile.py --json OUT --frames 2000

A tail in a process of its own serves an honest client over gRPC while an attacker does its worst; what the tail learns
of the honest client's steps must be what it learns without the attacker, bit by bit, and its peak memory at most twice
as large. Lies in a round's messages are told in whole rounds of three clients. The attacker has no more than what
admission gives a client: its own one-time tokens.
"""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import _repository  # noqa: F401
from _child import Child
from _hostile_attacks import CLIENTS, MUTATED, NEED_A_VICTIM, Attack, attacks, peace
from _hostile_rounds import LIES, Rounds
from _hostile_server import HONEST, STEPS
from _hostile_wire import HONEST_LIMIT_S, Honest, Tally
from _provenance import provenance

SEED = 0
FRAMES = 100_000
FRAMES_A_ROUND = 1000
NORMAL_ROUNDS = 3
ANSWER_LIMIT_S = 120.0
UNDER_WAY_S = 0.5
"""after which an attack is under way, and the honest client joins"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
Row = dict[str, Any]


class Wire:
    """A tail, the honest client, and what both are without an attacker."""

    def __init__(self, server: Child) -> None:
        self._server = server
        server.hear(ANSWER_LIMIT_S)
        normal = [self._round(None, 0, Tally(), 0) for _ in range(NORMAL_ROUNDS)]
        self.normal_bytes = max(closed["peak_bytes"] for closed, _ in normal)
        (self._learned,) = {closed["learned"] for closed, _ in normal}

    def row(self, name: str, rounds: int, clients: int) -> Row:
        """An attack in `rounds` rounds, by so many admitted clients of the attacker's in each."""
        tally, peak, longest_s, equal = Tally(), 0, 0.0, True
        started = time.monotonic()
        for number in range(rounds):
            closed, honest_s = self._round(name, clients, tally, SEED + number)
            peak, longest_s = max(peak, closed["peak_bytes"]), max(longest_s, honest_s)
            equal &= closed["learned"] == self._learned and closed["trained"].keys() == {HONEST}
        return {
            "attack": name,
            "attempts": tally.attempts,
            "accepted_wrong": tally.accepted_wrong,
            "hangs": tally.hangs + (longest_s > HONEST_LIMIT_S),
            "honest_equal": equal,
            "honest_longest_s": longest_s,
            "peak_bytes": peak,
            "memory_ratio": peak / self.normal_bytes,
            "seconds": time.monotonic() - started,
            "said": dict(tally.refusals.most_common()),
            "examples": tally.examples,
        }

    def _round(self, name: str | None, clients: int, tally: Tally, seed: int) -> tuple[Row, float]:
        """A round of the honest client, under attack: what the tail says of it, and that client's longest wait."""
        bad = [f"bad-{number}" for number in range(clients)]
        opened = self._server.ask({"do": "open", "round_number": 1, "clients": [HONEST, *bad]}, ANSWER_LIMIT_S)
        address, tokens = opened["address"], opened["tokens"]
        honest_token = tokens.pop(HONEST)
        honest = Honest(address, honest_token)
        if name in NEED_A_VICTIM:
            honest.join()
        with ThreadPoolExecutor(1) as pool:
            attack: Attack = attacks(honest_token)[name] if name else peace
            attacking = pool.submit(attack, address, tokens, tally, seed)
            if name not in NEED_A_VICTIM:
                time.sleep(UNDER_WAY_S)
                honest.join()
            for number in range(STEPS - 1):
                honest.step(number)
            attacking.result()
        honest.step(STEPS - 1)
        honest.leave()
        return self._server.ask({"do": "close"}, ANSWER_LIMIT_S), honest.longest_s


def rows(frames: int) -> Iterator[Row]:
    """All rows, one after the other."""
    with closing(Child("_hostile_server.py", {}, (), ENVIRONMENT)) as server:
        wire = Wire(server)
        for name, clients in CLIENTS.items():
            yield wire.row(name, 1, clients)
        full, rest = divmod(frames, FRAMES_A_ROUND)
        yield wire.row(MUTATED, full, FRAMES_A_ROUND) if full else wire.row(MUTATED, 1, rest)
    with Rounds() as lies:
        for name in LIES:
            yield lies.row(name)


def line_of(row: Row) -> str:
    """A row for people."""
    said = ", ".join(f"{code} {count}" for code, count in list(row.get("said", {}).items())[:6])
    ratio = f"  memory x {row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
    kept = "as without it" if row["honest_equal"] else "NOT as without it"
    return (
        f"{row['attack']:38}{row['attempts']:>8}  wrong {row['accepted_wrong']}  hangs {row['hangs']}  "
        f"{kept}{ratio}  {row['seconds']:.1f} s  {said}"
    )


def main() -> None:
    """Attack, print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--frames", type=int, default=FRAMES, help="mutated frames, in rounds of 1000")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the tail goes with it, too
    found: list[Row] = []
    for row in rows(arguments.frames):
        found.append(row)
        print(line_of(row), flush=True)
    figures = {
        "accepted_wrong": sum(row["accepted_wrong"] for row in found),
        "hangs": sum(row["hangs"] for row in found),
        "memory_ratio": max(row["memory_ratio"] for row in found if "memory_ratio" in row),
        "honest_equal": all(row["honest_equal"] for row in found),
        "frames": next(row["attempts"] for row in found if row["attack"] == MUTATED),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**figures, "rows": found, **provenance(SEED)}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
