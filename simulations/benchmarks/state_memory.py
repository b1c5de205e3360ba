"""Memory of what a run's rounds leave behind: the weight delta at clients and server, in files and in memory.

    python simulations/benchmarks/state_memory.py --json state_memory.json [--rounds 30]

A LLaMA with random weights in bf16 and as many blocks as its heads take, plus two. Every round brings an update of
stacked factors for every matrix, as five clients of rank 16 make it; after some rounds the sum of them is a dense
float32 matrix. Each side has a process of its own:

- *client, files*: loads its head, brings the delta in its `FileStore` up to date, merges it into the head;
- *client, memory*: the same with the delta in the process, as an app that holds it between rounds would;
- *server, files*: adds the update to the delta in a `ScratchFolder`, merges it, and gives a client what it lacks;
- *server, memory*: the same with the delta in the process.

`peak_bytes` is the most that was resident in a round (VmHWM, which counts mapped pages, too), less what was resident
in the first one's; `growth` that of the last round. Where files hold the delta, it is bounded by a few dense matrices,
however many rounds there are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _provenance import provenance
from transformers import AutoModelForCausalLM, LlamaConfig

from hsplit_flwr.common.tables import format_bytes, format_table
from hsplit_flwr.training.host_memory import CLIENT_TUNABLES

SIDES = ("client, files", "client, memory", "server, files", "server, memory")
CUT, HIDDEN, INTERMEDIATE = 6, 768, 2048
RANK = 5 * 16
SHOWN = (1, 2, 5, 10, 20, 30)


def save_model(folder: Path) -> dict[str, int]:
    """Write the model; returns bytes of what memory is compared with."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=CUT + 2,
        num_attention_heads=12, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers.0." in name]
    return {
        "block_weights": 2 * sum(layer.weight.numel() for layer in layers),
        "block_delta_dense": 4 * sum(layer.weight.numel() for layer in layers),
        "block_update": 4 * RANK * sum(sum(layer.weight.shape) for layer in layers),
        "largest_matrix_dense": 4 * max(layer.weight.numel() for layer in layers),
    }


def measure(side: str, model: Path, rounds: int) -> dict[str, Any]:
    """The rounds of one side."""
    order = {"side": side, "model": str(model), "rounds": rounds, "rank": RANK, "cut": CUT}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_state_process.py")), json.dumps(order)],
        env={"GLIBC_TUNABLES": CLIENT_TUNABLES, **os.environ},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    first = found[0]["peak_bytes"]
    return {"side": side, "growth": found[-1]["peak_bytes"] - first, "first_peak_bytes": first, "rounds": found}


def show(rows: list[dict[str, Any]], sizes: dict[str, int]) -> str:
    """A table: peaks above that of the first round, and what is on disk in the end."""
    shown = [number for number in SHOWN if number <= len(rows[0]["rounds"])]
    lines = []
    for row in rows:
        peaks = [row["rounds"][number - 1]["peak_bytes"] - row["first_peak_bytes"] for number in shown[1:]]
        lines.append(
            [row["side"], format_bytes(row["first_peak_bytes"]), *(f"{peak / 1e6:+.1f}" for peak in peaks),
             format_bytes(row["rounds"][-1]["disk_bytes"])]
        )  # fmt: skip
    header = ["side", "peak of round 1", *(f"round {n}, MB" for n in shown[1:]), "on disk"]
    about = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in sizes.items())
    table = format_table(header, lines, markdown=False, left_aligned=1)
    return f"{table}\n\n{about}; {CUT} blocks a head, {CUT + 2} the model"


def main() -> None:
    """Measure every side, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = save_model(Path(folder))
        rows = [measure(side, Path(folder), arguments.rounds) for side in SIDES]
    print(show(rows, sizes))
    if arguments.json:
        result = {**provenance(seed=0), "sizes": sizes, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
