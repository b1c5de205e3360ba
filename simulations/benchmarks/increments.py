"""What a client whose weight delta is large downloads in a deployment's later rounds: increments, not the whole.

    python simulations/benchmarks/increments.py --json increments.json [--rank 420] [--blocks 5] [--exchange messages]

A SuperLink and two SuperNodes, processes on loopback, train heads of a LLaMA with random weights: one of `--blocks`
blocks and `--rank`, and one of a block and rank 16. Flower carries a client's Context from message to message, and
loses one of more than some 0.18 GiB without a word (flwr 1.42); the delta is in the client's own files
(`federation/client_store.py`). Per round: what each client downloads, what the whole delta of the large head would
take, the largest Context that came with a message, and seconds per message.
"""

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _flower import loopback
from _provenance import provenance
from transformers import AutoModelForCausalLM, LlamaConfig

from hsplit_flwr.common.tables import format_bytes, format_table

APP = Path(__file__).with_name("large_state")
CLIENTS, TAIL_BLOCKS = 2, 1
GIB = 1 << 30


def save_model(folder: Path, blocks: int, hidden: int) -> list[tuple[int, int]]:
    """Write the model; returns the shapes of a head's matrices."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=43 * hidden // 16,
        num_hidden_layers=blocks + TAIL_BLOCKS, num_attention_heads=8, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    block = [m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".0." in name]
    return [(shape[0], shape[1]) for _ in range(blocks) for shape in block]


def whole_bytes(shapes: list[tuple[int, int]], rank: int, rounds: int) -> int:
    """The least that its delta takes after `rounds`: float32 factors of its own rank, or dense where that is less."""
    stacked = rank * rounds
    return sum(4 * min(stacked * (rows + columns), rows * columns) for rows, columns in shapes)


def play(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run, and what its server and clients wrote."""
    run_config = {
        "model": str(folder / "model"),
        "results": str(folder),
        "cut": options.blocks,
        "rank": options.rank,
        "rounds": options.rounds,
        "local-steps": options.steps,
        "exchange": options.exchange,
    }
    with loopback(folder / "home", CLIENTS) as deployment:
        log = deployment.run(APP, run_config, options.limit_s)
        kept = {n: _bytes_in(folder / "home" / f"state-{n}") for n in range(CLIENTS)}
    notes = [json.loads(line) for path in folder.glob("messages-*.jsonl") for line in path.read_text().splitlines()]
    return {"rounds": json.loads((folder / "rounds.json").read_text()), "messages": notes, "kept": kept, "log": log}


def report(played: dict[str, Any], shapes: list[tuple[int, int]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per round and client."""
    rows = []
    for record in played["rounds"]:
        number = record["round"]
        for client, moved in record["clients"].items():
            rows.append(
                {
                    "round": number,
                    "client": client,
                    "steps": moved["steps"],
                    "bytes_down": moved["down"],
                    "whole_bytes": whole_bytes(shapes, options.rank, number - 1) if client == "0" else None,
                    "round_s": record["seconds"]["fit"],
                }
            )
    return rows


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _seconds_per_message(messages: list[dict[str, Any]]) -> float | None:
    """Median time between two messages of a client."""
    times: dict[str, list[float]] = defaultdict(list)
    for message in messages:
        times[message["client"]].append(message["at"])
    gaps = sorted(b - a for at in times.values() for a, b in zip(sorted(at), sorted(at)[1:], strict=False))
    return gaps[len(gaps) // 2] if gaps else None


def show(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    head = ["round", "client", "steps", "downloads", "the whole would be", "round s"]
    lines = [
        [
            str(row["round"]), row["client"], str(row["steps"]), format_bytes(row["bytes_down"]),
            "-" if row["whole_bytes"] is None else format_bytes(row["whole_bytes"]), f"{row['round_s']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return format_table(head, lines, markdown=False)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=5, help="of a head")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=420)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--exchange", choices=("grpc", "messages"), default="grpc")
    parser.add_argument("--limit-s", type=float, default=480.0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="increments-"))
    try:
        shapes = save_model(folder / "model", options.blocks, options.hidden)
        played = play(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = report(played, shapes, options)
    failures = [line for record in played["rounds"] for line in record["failures"]]
    found = {
        "rows": rows,
        "failures": failures,
        "context_bytes": max(message["context_bytes"] for message in played["messages"]),
        "kept_bytes": played["kept"],
        "messages": len(played["messages"]),
        "seconds_per_message": _seconds_per_message(played["messages"]),
        "exchange": options.exchange,
        **provenance(0),
    }
    kept = ", ".join(f"{size / GIB:.2f} GiB" for size in played["kept"].values())
    print(show(rows))
    print(
        f"\nkept on disk: {kept}; the largest Context: "
        f"{found['context_bytes']:,} bytes; {found['messages']} messages, {found['seconds_per_message']:.1f} s apart"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
