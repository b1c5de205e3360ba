"""``rounds.jsonl``: a line of JSON for every round of a run, there as soon as the round is over.

For people who follow a run (``tail -f``), for collectors of logs, and for `run_status`.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hsplit_flwr.reports.best_round import best_round
from hsplit_flwr.reports.records import RoundRecord, json_value

ROUNDS = "rounds.jsonl"
FIGURES = ("central_perplexity", "federated_perplexity", "train_loss", "tokens", "clients", "failures", "seconds")
"""of a `RoundRecord`, as they stand in its line"""
KEYS = frozenset(("round", "time", "best_round", *FIGURES))
"""that every line has"""


def append_round(folder: Path, history: Sequence[RoundRecord]) -> None:
    """Append the line of the last round of `history`, and hand it to the system at once.

    Raises:
        OSError: a full disk or an unwritable folder.
    """
    if not history:
        return
    record, best = history[-1], best_round(history)
    line = {
        "round": record.round,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "best_round": best.round if best else None,
        **{name: json_value(getattr(record, name)) for name in FIGURES},
    }
    with (folder / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def forget_rounds_after(folder: Path, round_number: int) -> None:
    """Take out the lines of later rounds: a run that is resumed plays them again. Half a line goes, too.

    Raises:
        OSError: the file cannot be read or written.
    """
    path = folder / ROUNDS
    if not path.exists():
        return
    kept = [line for line in read_rounds(folder) if line["round"] <= round_number]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
    unfinished = path.with_name(f".{ROUNDS}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The lines so far, each as it was written; none where there is no file.

    What is no line of a round is passed over: the last one of a process that was killed while it wrote.

    Raises:
        OSError: the file cannot be read.
    """
    path = folder / ROUNDS
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= KEYS:
            found.append(line)
    return found
