"""What a step takes over real links, and what the virtual clock says it takes.

    python simulations/benchmarks/exchange.py --json OUT

Heads and the tail are processes in network namespaces of their own, joined by veth pairs whose rates `tc` limits
(`_network.py`): Linux and root; elsewhere it says so and measures nothing. Data: the embedded restaurants. Every
technique trains on the same batches over the real gRPC path, alternating, `--repeats` times. Links (Mbit/s up/down, of
Ethernet frames): none (loopback), 60/110, 15/28, and one *in proportion*: this machine computes far slower than the
devices that are stated for 60/110, so that their link hardly counts beside it. It slows the link down as well, until
transfer takes the share of a step that it takes in the experiments' homogeneous setting. Columns:

* ``s/step``: measured, mean; ``predicted``: by `planning/clock.py` from stated rates, the cost model's FLOPs, the
  frames' bytes and the latency that a client's probe measures on the idle link (half of a small exchange). The FLOP/s
  of heads and tail are calibrated on the compute seconds that they report of the very same steps; what handling a part
  takes beside that (packing, checks, gRPC, threads) on one round of whole batches over loopback, before those of the
  rows, for all links. On loopback the rate is that of the probe.
* ``bytes/step``: both ways, one head; ``/payload``: over positions x hidden size x bits / 8, both ways
* ``bytes/rate``: the least that the bytes can take; ``beyond``: what a step takes beyond that and the compute of head
  and tail: packet headers, gRPC, packing, threads; negative where transfer and compute overlap

The JSON also has ``worst_prediction_error`` (target <= 0.15), ``worst_rate_error`` (of plain TCP over a link against
its stated rate, <= 0.02), ``worst_byte_error`` (0: a frame's size is known beforehand), goodput of TCP and of gRPC per
link, ``speedup_over_bf16`` (over bf16 with padding; target >= 1.9 for all techniques together), and
``loopback_over_monolithic`` (target >= 0.95; `split_overhead.py`'s ratio with the technique's codecs).
"""

import argparse
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import split_overhead
import torch
from _child import Child
from _deployment import ROUND, RUN, SEED, Deployment
from _exchange_rows import (
    BYTES_PER_S,
    HEADINGS,
    HeadRound,
    Link,
    Measured,
    Row,
    Technique,
    add_speedups,
    handling_of,
    in_proportion,
    line_of,
    row_of,
    summary,
)
from _network import Namespace, Rates, Star, why_not
from _provenance import provenance

from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.host_memory import CLIENT_TUNABLES

BF16 = {"activation_codec": "bf16", "gradient_codec": "bf16"}
INT8 = {"activation_codec": "int8", "gradient_codec": "int8"}
PARTS = {"micro_batches": 4, "micro_batches_in_flight": 3, "micro_steps": True}
"""as people would deploy them: more in flight learns from staler adapters"""
BASELINE, CALIBRATION = "bf16, padded", "bf16"
TECHNIQUES: Mapping[str, Technique] = {
    BASELINE: Technique(BF16, padding_travels=True),
    CALIBRATION: Technique(BF16),
    "int8": Technique(INT8),
    "int4": Technique({"activation_codec": "int4", "gradient_codec": "int4"}),
    "bf16, 4 parts": Technique({**BF16, **PARTS}),
    "all": Technique({**INT8, **PARTS}),
}
"""by name; the first is what the others are compared with"""
AGAINST_MONOLITHIC = ("bf16", "all")
LOOPBACK, IN_PROPORTION = "loopback", "in proportion"
LINKS: Mapping[str, Rates | None] = {
    LOOPBACK: None,
    "60/110": Rates(60, 110),
    "15/28": Rates(15, 28),
    IN_PROPORTION: None,
}
"""by name; None: not limited, or found out after `LOOPBACK`"""
DEPLOYMENTS = {
    "tiny-gpt2": Deployment("tiny-gpt2", cut=1, batch=4, max_length=128, rank=8, heads=1),
    "smollm2-135m": Deployment("smollm2-135m", cut=4, batch=4, max_length=128, rank=8, heads=1),
}
STEPS = {"tiny-gpt2": 10, "smollm2-135m": 1}
"""times what was asked for"""
WARM_UP_STEPS = 2
START_LIMIT_S, ROUND_LIMIT_S, CLOSE_LIMIT_S = 300.0, 900.0, 60.0
ENVIRONMENT = {"GLIBC_TUNABLES": CLIENT_TUNABLES, "OMP_NUM_THREADS": "1"}


class Processes:
    """The tail and its heads, on one link."""

    def __init__(self, deployment: Deployment, tail: Child, heads: Sequence[Child], addresses: Sequence[str]) -> None:
        self._deployment = deployment
        self._tail = tail
        self._heads = dict(zip(deployment.clients, heads, strict=True))
        self._addresses = dict(zip(deployment.clients, addresses, strict=True))

    def link(self, name: str, rates: Rates | None) -> tuple[Link, dict[str, float]]:
        """The link for the clock, and what a client's probe says of it: goodput of gRPC, latency."""
        opened = self._tail.ask(asdict(TrainingConfig(rounds=1)), START_LIMIT_S)
        found = [
            head.ask(self._told("probe", client, opened["port"], token, TrainingConfig()), START_LIMIT_S)
            for (client, head), token in zip(self._heads.items(), opened["probe_tokens"].values(), strict=True)
        ]
        self._tail.ask({}, CLOSE_LIMIT_S)
        probed = {key: fmean(one[key] for one in found) for key in found[0]}
        measured = Rates(probed["uplink_bytes_per_s"] / BYTES_PER_S, probed["downlink_bytes_per_s"] / BYTES_PER_S)
        latency_s = probed["latency_s"]
        goodput = {"grpc_up_mbit_s": measured.up_mbit_s, "grpc_down_mbit_s": measured.down_mbit_s}
        return Link(name=name, rates=rates or measured, latency_s=latency_s), {"latency_s": latency_s, **goodput}

    def train(self, technique: Technique, training: TrainingConfig) -> Measured:
        """A round of all heads."""
        opened = self._tail.ask(asdict(training), START_LIMIT_S)
        for client, head in self._heads.items():
            told = self._told("train", client, opened["port"], opened["tokens"][client], training)
            head.ask({**told, "padding_travels": technique.padding_travels}, START_LIMIT_S)
        for head in self._heads.values():
            head.tell({})
        reports = tuple(HeadRound.of(head.hear(ROUND_LIMIT_S)) for head in self._heads.values())
        tail_s = self._tail.ask({}, CLOSE_LIMIT_S)["compute_s"]
        return Measured(steps=training.local_steps, heads=reports, tail_s=tail_s)

    def _told(self, mode: Mode, client: str, port: int, token: str, training: TrainingConfig) -> dict[str, Any]:
        trains = ClientPlan(self._deployment.cut, self._deployment.lora)
        plan = trains if mode == "train" else ClientPlan(1, LoraSpec(0))
        address = f"{self._addresses[client]}:{port}"
        task = RoundTask(RUN, ROUND, client, mode, address, token, ROUND_LIMIT_S, 64 << 20, plan, training)
        return {"task": task.to_json()}


def training_of(technique: Technique, steps: int) -> TrainingConfig:
    """One round of so many steps; measuring importance is left out, which the first step of a round would have."""
    return TrainingConfig(
        rounds=1, local_steps=steps, learning_rate=1e-4, importance_steps=0, seed=SEED, **technique.training
    )


def checked(star: Star, rates: Rates) -> dict[str, float]:
    """Limit the links; what plain TCP makes of the first of them."""
    star.limit(rates)
    figures: dict[str, float] = {}
    for side, stated in (("up", rates.up_mbit_s), ("down", rates.down_mbit_s)):
        transfer = star.transfer(stated, up=side == "up")
        figures |= {
            f"{side}_mbit_s": stated,
            f"{side}_rate_error": transfer.wire_mbit_s / stated - 1,
            f"tcp_{side}_mbit_s": transfer.goodput_mbit_s,
            f"{side}_dropped": transfer.dropped,
        }
    return figures


def measure(
    deployment: Deployment, links: Sequence[str], steps: int, repeats: int, found: list[dict[str, Any]]
) -> Iterator[Row]:
    """The rows of one model, link by link; what is found out about its links goes to `found`."""
    rates = dict(LINKS)
    with Star(deployment.heads) as star, ExitStack() as running:
        child = Child("_exchange_tail.py", asdict(deployment), star.tail.enter, ENVIRONMENT)
        tail = running.enter_context(closing(child))
        tail.hear(START_LIMIT_S)
        handling_s = 0.0
        for name in links:
            limited = rates[name]
            figures = checked(star, limited) if limited else {}
            with ExitStack() as joined:
                processes = _joined(deployment, tail, star, loopback=limited is None, joined=joined)
                processes.train(TECHNIQUES[CALIBRATION], training_of(TECHNIQUES[CALIBRATION], WARM_UP_STEPS))
                link, probed = processes.link(name, limited)
                if name == LOOPBACK:
                    plain = TECHNIQUES[CALIBRATION]
                    handling_s = handling_of(processes.train(plain, training_of(plain, steps)), link)
                link = replace(link, handling_s=handling_s)
                found.append({"model": deployment.model, "link": name, "handling_s": handling_s, **figures, **probed})
                rounds: dict[str, list[Measured]] = {technique: [] for technique in TECHNIQUES}
                for _ in range(repeats):
                    for key, technique in TECHNIQUES.items():
                        rounds[key].append(processes.train(technique, training_of(technique, steps)))
            for key, technique in TECHNIQUES.items():
                yield row_of(deployment, key, technique, training_of(technique, steps), link, rounds[key])
            if name == LOOPBACK:
                training = training_of(TECHNIQUES[CALIBRATION], steps)
                rates[IN_PROPORTION] = in_proportion(deployment, training, rounds[CALIBRATION][-1])


def _joined(deployment: Deployment, tail: Child, star: Star, *, loopback: bool, joined: ExitStack) -> Processes:
    """Heads at the other ends of the links, or beside the tail."""
    places: list[Namespace] = [star.tail] * deployment.heads if loopback else star.heads
    addresses = ["127.0.0.1" if loopback else star.tail_address(head) for head in range(deployment.heads)]
    heads = [
        joined.enter_context(
            closing(Child("_exchange_head.py", {**asdict(deployment), "client": client}, place.enter, ENVIRONMENT))
        )
        for client, place in zip(deployment.clients, places, strict=True)
    ]
    for head in heads:
        head.hear(START_LIMIT_S)
    return Processes(deployment, tail, heads, addresses)


def against_monolithic(model: str, steps: int) -> list[Row]:
    """Tokens/s of the split over those of monolithic PEFT, both in this machine's own namespace."""
    deployment = DEPLOYMENTS[model]
    rows = []
    for key in AGAINST_MONOLITHIC:
        setting = split_overhead.Setting(
            model, deployment.cut, 8, 64, deployment.rank, steps, "fp32", "cpu", dict(TECHNIQUES[key].training)
        )
        ratio = split_overhead.measure(setting)["ratio_to_monolithic"]
        rows.append({"model": model, "cut": deployment.cut, "technique": key, "ratio": ratio})
        print(f"{model:13}{'loopback':14}{key:14} split / monolithic PEFT {ratio:.3f}", flush=True)
    return rows


def asked() -> argparse.Namespace:
    """The command line; ``models`` and ``links`` as lists of known names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--models", default=",".join(DEPLOYMENTS), help="with commas between them")
    parser.add_argument("--links", default=",".join(LINKS), help="with commas between them")
    parser.add_argument("--heads", type=int, default=1, help="each with a link of its own")
    parser.add_argument("--steps", type=int, default=4, help="per technique and repeat; ten times as many of tiny-gpt2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-monolithic", action="store_true", help="leave out loopback_over_monolithic")
    arguments = parser.parse_args()
    for name, known in (("models", DEPLOYMENTS), ("links", LINKS)):
        found = getattr(arguments, name).split(",")
        if unknown := [one for one in found if one not in known]:
            parser.error(f"Expected --{name} among {', '.join(known)}, found {', '.join(unknown)}.")
        setattr(arguments, name, found)
    before = arguments.links[: arguments.links.index(IN_PROPORTION)] if IN_PROPORTION in arguments.links else [LOOPBACK]
    if LOOPBACK not in before:
        parser.error(f"Expected {LOOPBACK} before {IN_PROPORTION}, whose rates follow from it, found it not. Add it.")
    return arguments


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = asked()
    if reason := why_not():
        print(f"exchange.py measures nothing here: {reason}.")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that namespaces and processes go with it, too
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as the children, for the comparison with PEFT
    rows: list[Row] = []
    links: list[dict[str, Any]] = []
    monolithic: list[Row] = []
    print(HEADINGS)
    for model in arguments.models:
        deployment = replace(DEPLOYMENTS[model], heads=arguments.heads)
        steps = arguments.steps * STEPS[model]
        for row in measure(deployment, arguments.links, steps, arguments.repeats, links):
            rows.append(row)
            print(line_of(row), flush=True)
        if not arguments.without_monolithic:
            monolithic += against_monolithic(model, steps)
    add_speedups(rows, BASELINE)
    figures = summary(rows, links)
    result = {
        **figures, "loopback_over_monolithic": monolithic, "links": links, "rows": rows, **provenance(SEED),
    }  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
