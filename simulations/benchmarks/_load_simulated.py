"""Many simulated clients of `load.py`: a real ``flwr run`` in a FLWR_HOME of its own, of which nothing is left."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from _flower import own_home, run_simulation

from hsplit_flwr.models.assets import tiny_checkpoint

APP = Path(__file__).parents[1] / "finetune"
ACTORS = 2
ROWS_PER_CLIENT = 2
LIMIT_S = 3600.0


def simulate(supernodes: int, per_round: int, rounds: int) -> dict[str, Any]:
    """`rounds` rounds of `per_round` clients out of `supernodes`, a client each.

    Raises:
        RuntimeError: the run failed, or took longer than `LIMIT_S`.
    """
    with tempfile.TemporaryDirectory(prefix="load-") as name, own_home(Path(name)) as environment:
        folder = Path(name)
        _write_texts(folder / "texts.jsonl", supernodes * ROWS_PER_CLIENT)
        config = _run_config(folder, supernodes, per_round, rounds)
        federation = f"num-supernodes={supernodes} client-resources-num-cpus=1 init-args-num-cpus={ACTORS}"
        started = time.monotonic()
        summary = run_simulation(APP, federation, config, folder, environment, LIMIT_S)
        seconds = time.monotonic() - started
        return {"supernodes": supernodes, "per_round": per_round, "seconds": seconds, **_told(summary)}


def _told(summary: Path) -> dict[str, Any]:
    content = json.loads(summary.read_text())
    return {
        "status": content["status"],
        "wall_seconds": content["wall_seconds"],
        "rounds": [
            {
                "clients": len(record["clients"]),
                "incidents": len(record["failures"]),
                "first_incidents": record["failures"][:3],
                "tokens": sum(client["tokens"] for client in record["clients"]),
                "seconds": record["seconds"],
            }
            for record in content["history"]
        ],
    }


def _run_config(folder: Path, supernodes: int, per_round: int, rounds: int) -> str:
    ones = ",".join(["1"] * supernodes)
    values: dict[str, Any] = {
        "model": str(tiny_checkpoint()),
        "data": str(folder / "texts.jsonl"),
        "output-dir": str(folder / "results"),
        "cuts": ones,
        "ranks": ones.replace("1", "2"),
        "tail-rank": 4,
        "fraction-clients": per_round / supernodes,
        "min-nodes": supernodes,
        "rounds": rounds,
        "local-steps": 2,
        "batch-size": 1,
        "max-length": 48,
        "eval-examples": 16,
        "validation-share": 0.02,
        "federated-evaluation": False,
        "keep-best": False,
        "keep-checkpoints": 0,
        "server-threads": 1,
    }
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def _write_texts(path: Path, count: int) -> None:
    lines = [
        {"text": f"Order {number}: {number % 7} of item {number % 13}, to be sent today."} for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
