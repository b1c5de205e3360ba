"""What a head's blocks take in 4 and 8 bits, against bf16, and how long its step is.

    python simulations/benchmarks/quantized.py --json OUT

Each head is loaded in a process of its own, all of its weights touched; everything computes in bf16. Columns:

* ``block``: bytes of the tensors of one block, with scales and tables
* ``block x``: the same as a share of bf16 (target for nf4: <= 0.35)
* ``beside x``: with what stands beside the weights once its largest rank is reached (`delta-rank`), as a share of bf16
* ``resident x``: what the process grows by for all blocks but one, as a share of bf16 (embeddings taken off)
* ``step``, ``step x``: forward and backward pass of the head with adapters everywhere, median, against bf16
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _models import MODELS
from _provenance import provenance

from hsplit_flwr.lora.update_coding import DELTA_RANK
from hsplit_flwr.training.workload import PLAIN, QUANTIZATIONS

SEED = 0
BF16 = "bf16"
CUTS = {"tiny-gpt2": 7, "smollm2-135m": 16}
BATCH, LENGTH, RANK = 4, 64, 8
PROCESS_LIMIT_S = 600.0


def measured(model: str, quantization: str, repeats: int) -> dict[str, Any]:
    """The figures of one head, from a fresh process."""
    order = {
        "model": model,
        "quantization": quantization,
        "dtype": BF16,
        "cut": CUTS[model],
        "batch_size": BATCH,
        "sequence_length": LENGTH,
        "rank": RANK,
        "delta_rank": DELTA_RANK,
        "repeats": repeats,
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_quantized_head.py")), json.dumps(order)],
        timeout=PROCESS_LIMIT_S,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**order, **figures}


def rows_of(model: str, repeats: int) -> list[dict[str, Any]]:
    """A row per format, the first bf16; all others as shares of it."""
    rows = [measured(model, quantization, repeats) for quantization in QUANTIZATIONS]
    plain = rows[0]
    outside = plain["head_bytes"] - plain["cut"] * plain["block_bytes"]
    of_blocks = plain["resident_bytes"] - outside
    for row in rows:
        row["block_share"] = row["block_bytes"] / plain["block_bytes"]
        row["resident_share"] = (row["resident_bytes"] - outside) / of_blocks
        row["step_ratio"] = row["step_s"] / plain["step_s"]
        beside = row.get("head_bytes_beside", row["head_bytes"]) - outside
        row["beside_share"] = beside / (plain["cut"] * plain["block_bytes"])
    return rows


def table_line(row: dict[str, Any]) -> str:
    """One row for people."""
    name = BF16 if row["quantization"] == PLAIN else row["quantization"]
    shares = f"{row['block_share']:>9.3f}{row['beside_share']:>10.3f}{row['resident_share']:>12.3f}"
    step = f"{1000 * row['step_s']:>10.1f}{row['step_ratio']:>8.2f}"
    return f"{row['model']:14}{row['cut']:>4} {name:7}{row['block_bytes']:>12,}{shares}{step}"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    arguments = parser.parse_args()
    rows = []
    print(f"{'model':14}{'cut':>4} {'format':7}{'block':>12}{'block x':>9}{'beside x':>10}{'resident x':>12}"
          f"{'step ms':>10}{'step x':>8}")  # fmt: skip
    for model in arguments.models.split(","):
        rows += rows_of(model, arguments.repeats)
        print("\n".join(map(table_line, rows[-len(QUANTIZATIONS) :])), flush=True)
    worst = max(row["block_share"] for row in rows if row["quantization"] == "nf4")
    result = {"rows": rows, "worst_nf4_block_share": worst, **provenance(SEED)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
