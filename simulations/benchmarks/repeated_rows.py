"""How much of what a frozen head sends comes again: its rows, byte for byte, in the shuffled batches of a second epoch.

The tail keeps rows by their bytes (`activation-cache-mib`). A row's bits may differ in batches of other rows and
widths, by the kernels' order of adding up; a codec that rounds makes most of them the same again. Client 0 of the
embedded restaurants (non-IID, batches of 4), on the embedded model; frames as they travel, without a transport.

    python simulations/benchmarks/repeated_rows.py --json OUT
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _provenance import provenance

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.exchange.batches import batch_tensors, without_kept
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.kept_rows import KeptRows
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.models.segments import load_segment

SPEC = RunSpec("frozen_head", "heterogeneous", "dirichlet", 0, 0.01)
CUTS = (1, 4)
LIMIT_BYTES = 1 << 30
HEADER = Header("train", "run", 1, "0", 1)


def measure(task: Task, cut: int, codec_name: str, epoch: int) -> dict[str, Any]:
    """Two epochs of `epoch` batches each."""
    head, codec, kept = load_segment(task.files, 0, cut), CODECS[codec_name], KeptRows(LIMIT_BYTES)
    sent, referred, rows = [0, 0], 0, 0
    for step, batch in enumerate(islice(task.streams["0"](0), 2 * epoch)):
        mask, labels = batch["attention_mask"], batch["labels"]
        with torch.no_grad():
            whole = batch_tensors(head(batch["input_ids"], mask), mask, labels, codec, seed=step)
        tensors = without_kept(whole, mask, labels, codec, kept)
        sent[step // epoch] += len(encode(HEADER, tensors))
        if step >= epoch:
            rows += len(labels)
            referred += len(tensors.get("kept.rows", ()))
    return {"cut": cut, "codec": codec_name, "share_of_rows": referred / rows, "share_of_bytes": sent[1] / sent[0]}


def main() -> None:
    """Measure all, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Task.of(SPEC)
    epoch = len(task.streams["0"].__self__)  # type: ignore[attr-defined]
    rows = [measure(task, cut, codec, epoch) for cut in CUTS for codec in CODECS]
    options.json.write_text(json.dumps({"rows": rows, **provenance(SPEC.seed)}, indent=1) + "\n")
    cells = [
        [str(row["cut"]), row["codec"], f"{row['share_of_rows']:.2f}", f"{row['share_of_bytes']:.2f}"] for row in rows
    ]
    print(format_table(["cut", "codec", "rows that came again", "bytes / first epoch"], cells, False))


if __name__ == "__main__":
    main()
