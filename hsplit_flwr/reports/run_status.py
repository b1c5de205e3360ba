"""How a run goes, from what it leaves in its folder while it is under way: `flwr list` knows no rounds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hsplit_flwr.common.progress import format_duration
from hsplit_flwr.common.tables import MISSING, client_order, format_bytes, format_number, format_table
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.records import SUMMARY
from hsplit_flwr.reports.rounds_file import ROUNDS, read_rounds

Line = Mapping[str, Any]


@dataclass(frozen=True)
class RunState:
    """What a run's folder says."""

    folder: Path
    rounds: Sequence[Line]
    """the lines of ``rounds.jsonl``"""
    summary: Mapping[str, Any]
    """of ``summary.json``; empty before there is one"""
    seconds_ago: float
    """since the run last wrote"""

    def text(self) -> str:
        """The state for people."""
        sections = [self._headline(), _round_table(self.rounds)]
        if clients := _clients_of(self.rounds):
            sections.append(_client_table(clients))
        if incidents := [f"round {line['round']}: {text}" for line in self.rounds for text in line["failures"]]:
            sections.append("\n".join(["Who was left out, and why", *incidents]))
        return "\n\n".join(sections)

    def _headline(self) -> str:
        status = self.summary.get("status", "running")
        planned = self.summary.get("config", {}).get("rounds")
        played = f"{len(self.rounds)} of {planned}" if planned else str(len(self.rounds))
        lines = [f"{self.folder}: {status}, {played} rounds, last written {format_duration(self.seconds_ago)} ago"]
        if reason := self.summary.get("reason"):
            lines.append(f"why: {reason}")
        if best := self.summary.get("best"):
            scored = f"perplexity {format_number(best['perplexity'])} on {best['measured_on']}"
            where = f", in {best['adapter']}" if best["adapter"] else ""
            lines.append(f"best: round {best['round']}, {scored}{where}")
        return "\n".join(lines)


def run_state(folder: Path) -> RunState:
    """What `folder` says of the run that writes there.

    Raises:
        ConfigError: no run does, or its files cannot be read.
    """
    summary, rounds = folder / SUMMARY, folder / ROUNDS
    written = [path.stat().st_mtime for path in (summary, rounds) if path.is_file()]
    if not written:
        raise ConfigError(
            f"Expected the output folder of a run, with {ROUNDS} or {SUMMARY}, found neither in {folder}. A run writes "
            "them after its first round; its log names the folder."
        )
    try:
        content = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
        lines = read_rounds(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected {SUMMARY} and {ROUNDS} that can be read, found: {error}.") from error
    return RunState(folder, lines, content, max(0.0, datetime.now(UTC).timestamp() - max(written)))


def _round_table(rounds: Sequence[Line]) -> str:
    header = ["round", "ended at", "ppl central", "ppl federated", "train loss", "tokens", "clients", "left out"]
    rows = [
        [
            str(line["round"]),
            line["time"],
            format_number(line["central_perplexity"]),
            format_number(line["federated_perplexity"]),
            format_number(line["train_loss"]),
            f"{line['tokens']:,}",
            str(len(line["clients"])),
            str(len(line["failures"])),
        ]
        for line in rounds
    ]
    return format_table(header, rows, markdown=False, left_aligned=2) if rows else "No round is over yet."


def _clients_of(rounds: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in rounds:
        for client in line["clients"]:
            found.setdefault(client["client_id"], []).append({**client, "round": line["round"]})
    return found


def _client_table(clients: Mapping[str, Sequence[Line]]) -> str:
    rows = []
    for client in sorted(clients, key=client_order):
        parts = clients[client]
        last = parts[-1]
        rows.append(
            [
                client,
                str(last["round"]),
                str(last["cut"]),
                last["ranks"] or MISSING,
                f"{sum(part['tokens'] for part in parts):,}",
                format_number(last["loss"]),
                format_bytes(sum(part["bytes_up"] for part in parts)),
                format_bytes(sum(part["bytes_down"] for part in parts)),
            ]
        )
    return format_table(["client", "last round", "cut", "rank", "tokens", "loss", "up", "down"], rows, markdown=False)
