"""How many clients one tail takes: speed, memory per client, and what limits it first.

    python simulations/benchmarks/load.py --json OUT [--clients 10,100,500] [--simulated]

**Concurrent clients** of one tail (tiny GPT-2, cut after block 1) over real gRPC on loopback: one round, to which all
of them belong, and in each step every client has its turn. Tail and clients share this machine, so clients do not
compute: they are threads of a few processes, each with a connection of its own, and send activations that the real head
computed beforehand; frames are encoded, sent, checked and decoded as ever. Importance is not measured, which a round's
first step would have. Rows begin with the end of the first step, by when all clients are there:

* ``batches/s``: answered; ``steps/s``: a step is a batch of every client
* CPU milliseconds of a batch: ``alone``, the tail's compute called directly, without clients; ``worker``, the same with
  them; ``streams``, the tail's threads of clients; ``gRPC``, its other threads; ``heads``, the clients
* ``p50``, ``p95``: seconds from sending a batch to its gradient, at the client
* ``idle/client``: memory of the tail's process per client that joined; ``busy/client``: at the end of the last step
* ``computing``: share of the time that the tail's worker computed; else it waited for clients
* ``first bottleneck``: `first_bottleneck` says how it follows from these and the CPU seconds of the tail's threads

**Simulated clients** (``--simulated``): 1,000 SuperNodes of ``flwr run`` with a client each, rounds of 100, on two Ray
actors; `simulations/finetune` on made-up texts. Seconds of each phase, with Flower's own.

Rows say how busy the machine was with other things (``others``, in cores): compare only where that is little.
"""

import argparse
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from _child import Child
from _deployment import SEED, Deployment
from _load_simulated import simulate
from _provenance import provenance

from hsplit_flwr.common.tables import format_bytes, format_table
from hsplit_flwr.training.host_memory import CLIENT_TUNABLES

START_LIMIT_S, ROUND_LIMIT_S = 300.0, 330.0
LEAST_STEPS = 3
ENVIRONMENT = {"GLIBC_TUNABLES": CLIENT_TUNABLES, "OMP_NUM_THREADS": "1"}
BUSY = 0.9
"""share of the machine's cores from which on they are the limit"""
MOSTLY = 0.7
Row = dict[str, Any]


def deployment_of(clients: int) -> Deployment:
    """The model, and small batches: what counts here is their number."""
    return Deployment("tiny-gpt2", cut=1, batch=1, max_length=48, rank=4, heads=clients)


def measure(clients: int, steps: int, processes: int) -> Row:
    """One round of so many clients at once."""
    deployment = deployment_of(clients)
    order = {**asdict(deployment), "steps": steps}
    with ExitStack() as running:
        tail = running.enter_context(closing(Child("_load_tail.py", order, (), ENVIRONMENT)))
        opened = tail.hear(START_LIMIT_S)
        heads = [
            running.enter_context(closing(Child("_load_heads.py", order, (), ENVIRONMENT)))
            for _ in range(min(processes, clients))
        ]
        for head in heads:
            head.hear(START_LIMIT_S)
        started = time.perf_counter()
        for number, head in enumerate(heads):
            mine = dict(list(opened["tokens"].items())[number :: len(heads)])
            head.tell({"address": opened["address"], "tokens": mine})
        failed = [head.hear(START_LIMIT_S)["errors"] for head in heads]
        join_s = time.perf_counter() - started
        idle = tail.ask({}, START_LIMIT_S)
        before = psutil.cpu_times()
        for head in heads:
            head.tell({})
        reports = [head.hear(ROUND_LIMIT_S) for head in heads]
        after = psutil.cpu_times()
        figures = tail.ask({}, ROUND_LIMIT_S)
    return row_of(
        {**figures, **idle, "clients": clients, "join_s": join_s, "alone_cpu_s": opened["alone_cpu_s"]},
        reports,
        failed,
        machine_cpu_s=sum(getattr(after, kind) - getattr(before, kind) for kind in ("user", "system")),
    )


def row_of(figures: Row, reports: list[Row], failed: list[dict[str, int]], machine_cpu_s: float) -> Row:
    """What the table and the JSON say of one round."""
    seconds, cpu_s = figures["seconds"], figures["cpu_s"]
    whole_s = max(report["seconds"] for report in reports)
    heads_cpu_s = sum(report["cpu_s"] for report in reports)
    # The heads' seconds are those of all steps, the tail's those after the first one: as shares of a core.
    cores = {group: spent / seconds for group, spent in cpu_s.items()} | {"heads": heads_cpu_s / whole_s}
    busy = machine_cpu_s / whole_s
    errors = sum((Counter(one) for one in [*failed, *(report["errors"] for report in reports)]), Counter[str]())
    row = {
        **figures,
        "batches_per_s": figures["batches"] / seconds,
        "steps_per_s": figures["steps"] / seconds,
        "cpu_s_per_batch": {
            **{group: spent / figures["batches"] for group, spent in cpu_s.items()},
            "heads": heads_cpu_s / max(1, sum(report["batches"] for report in reports)),
        },
        "median_s": fmean(report["median_s"] for report in reports),
        "p95_s": max(report["p95_s"] for report in reports),
        "computing_share": figures["computing_s"] / seconds,
        "waiting_share": figures["waiting_s"] / seconds,
        "cores": cores,
        "others_cores": max(0.0, busy - sum(cores.values())),
        "machine_busy_share": busy / (os.cpu_count() or 1),
        "errors": dict(errors),
    }
    return {**row, "first_bottleneck": first_bottleneck(row)}


def first_bottleneck(row: Mapping[str, Any]) -> str:
    """What limited this round, from what was measured.

    The tail has one worker: if it computed for more than `MOSTLY` of the time, that is the limit, and it is held up by
    others where it had a core for less than `MOSTLY` of that. Else it waited for clients: because the machine's cores
    were busy (`BUSY`), and then mostly with whoever used most of them, or because a turn must wait for its client.
    """
    cores = {**row["cores"], "others": row["others_cores"]}
    names = {
        "streams": "a Python thread for each client at the tail",
        "grpc": "gRPC's threads at the tail",
        "heads": "the heads' processes",
        "worker": "the tail's compute",
        "others": "other work on this machine",
    }
    most = names[max(cores, key=lambda group: cores[group])]
    saturated = row["machine_busy_share"] >= BUSY
    if row["computing_share"] >= MOSTLY:
        held_up = row["cores"]["worker"] < MOSTLY * row["computing_share"]
        return "the tail's compute" + (", short of a core or of Python's lock" if held_up else "")
    if saturated:
        return f"the cores of this machine, most of them for {most}"
    return "the barrier: a turn waits for its client"


def line_of(row: Row) -> list[str]:
    """A row of the table."""
    return [
        str(row["clients"]),
        f"{row['batches_per_s']:.1f}",
        f"{row['steps_per_s']:.3g}",
        *(f"{1e3 * spent:.2f}" for spent in (row["alone_cpu_s"], *row["cpu_s_per_batch"].values())),
        f"{row['median_s']:.3f}",
        f"{row['p95_s']:.3f}",
        format_bytes(max(0, round(row["idle_bytes_per_client"]))),
        format_bytes(max(0, round(row["bytes_per_client"]))),
        f"{row['computing_share']:.0%}",
        f"{row['others_cores']:.1f}",
        str(sum(row["errors"].values())),
        row["first_bottleneck"],
    ]


HEADINGS = [
    "clients", "batches/s", "steps/s", "alone ms", "worker ms", "streams ms", "gRPC ms", "heads ms", "p50 s", "p95 s",
    "idle/client", "busy/client", "computing", "others", "errors", "first bottleneck",
]  # fmt: skip


def rows_of(counts: list[int], batches: int, processes: int) -> Iterator[Row]:
    """A row for every number of clients."""
    for clients in counts:
        yield measure(clients, max(LEAST_STEPS, round(batches / clients)), processes)


def asked() -> argparse.Namespace:
    """The command line; ``clients`` as numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--clients", default="10,100,500", help="at once, with commas between them; empty: none")
    parser.add_argument("--batches", type=int, default=2000, help="of all clients together, about")
    parser.add_argument("--processes", type=int, default=2, help="that clients are threads of")
    parser.add_argument("--simulated", action="store_true", help="also flwr run with many SuperNodes; takes long")
    parser.add_argument("--supernodes", type=int, default=1000, help="of the simulation, a client each")
    parser.add_argument("--per-round", type=int, default=100, help="of them in a round")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    try:
        arguments.clients = [int(count) for count in arguments.clients.split(",") if count]
    except ValueError:
        parser.error(f"Expected --clients as numbers with commas, found {arguments.clients!r}.")
    return arguments


def main() -> None:
    """Measure, print the tables, write the JSON."""
    arguments = asked()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its processes go with it, too
    load_before = os.getloadavg()
    rows = []
    for row in rows_of(arguments.clients, arguments.batches, arguments.processes):
        rows.append(row)
        print(format_table(HEADINGS, [line_of(row)], markdown=False), flush=True)
    if rows:
        print("\n" + format_table(HEADINGS, list(map(line_of, rows)), markdown=False))
    simulated = simulate(arguments.supernodes, arguments.per_round, arguments.rounds) if arguments.simulated else None
    if simulated:
        print(json.dumps(simulated, indent=2))
    result = {"rows": rows, "simulated": simulated, "load_average_before": load_before, **provenance(SEED)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
