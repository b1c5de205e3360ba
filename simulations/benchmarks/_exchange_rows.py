"""What `exchange.py` makes of its measurements: predictions by the virtual clock, rows, a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, median
from typing import Any, NamedTuple

from _deployment import Deployment
from _network import Rates

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.settings import SETTINGS
from hsplit_flwr.experiments.work import split_work
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.clock import ClientWork, play_round
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4, "int4_stochastic": 4}
"""of a value, without scales"""
BYTES_PER_S = 1e6 / 8
"""of a Mbit/s"""
IN_PROPORTION_TO = "homogeneous"
"""the setting of the experiments whose balance of compute and transfer a link can be given"""
Row = dict[str, Any]


class Technique(NamedTuple):
    """One way to exchange."""

    training: Mapping[str, Any]
    """fields of `TrainingConfig`"""
    padding_travels: bool = False
    """see `Deployment.batches`"""


@dataclass(frozen=True, kw_only=True)
class HeadRound:
    """What one head reports of a round."""

    seconds: float
    compute_s: float
    exchange_s: float
    bytes_up: int
    bytes_down: int
    forms: tuple[tuple[BatchForm, ...], ...]
    """step by step, of the parts of its batch"""

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "HeadRound":
        """From its JSON."""
        forms = tuple(tuple(BatchForm(*form) for form in parts) for parts in report["forms"])
        return cls(**{**report, "forms": forms})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A round of steps, of all heads and the tail."""

    steps: int
    """of every head"""
    heads: tuple[HeadRound, ...]
    tail_s: float
    """what the tail computed in all steps"""

    @property
    def step_s(self) -> float:
        """Seconds of a step, mean, of the head that was last."""
        return max(head.seconds for head in self.heads) / self.steps


@dataclass(frozen=True, kw_only=True)
class Link:
    """What the clock is told of a head's link to the tail."""

    name: str
    rates: Rates
    """stated, or as measured where the link is not limited"""
    latency_s: float
    """one way, as `measure_link` measures it before"""
    handling_s: float = 0.0
    """what a part takes at head and tail beside compute: packing, checks, gRPC, threads (`handling_of`)"""


@cache
def costs_of(deployment: Deployment, training: TrainingConfig) -> ModelCosts:
    """The cost model of batches at their full length."""
    workload = Workload.of(training, batch_size=deployment.batch, sequence_length=deployment.max_length)
    return ModelCosts(deployment.files().config, workload)


def work_of(deployment: Deployment, training: TrainingConfig, measured: Measured) -> list[ClientWork]:
    """What every head's round is to the clock."""
    costs = costs_of(deployment, training)
    names = {matrix.name: matrix.block for matrix in costs.matrices}
    ranks = {name: deployment.rank for name, block in names.items() if block < deployment.cut}
    tail_ranks = dict.fromkeys(names.keys() - ranks.keys(), deployment.rank)
    return [
        split_work(client, costs, deployment.cut, ranks, tail_ranks, head.forms, download_bytes=0, upload_bytes=0)
        for client, head in zip(deployment.clients, measured.heads, strict=True)
    ]


def predicted_step_s(deployment: Deployment, training: TrainingConfig, measured: Measured, link: Link) -> float:
    """Seconds of a step by the virtual clock.

    From the link's rates and latency, the frames' bytes, what handling a part takes and the cost model's FLOPs. How
    many of them head and tail do in a second is taken from what they report of the same steps: this machine's pace is
    not the question.
    """
    works = work_of(deployment, training, measured)
    devices = {
        work.client: _device((work.forward_flops + work.backward_flops) * work.steps / head.compute_s, link)
        for work, head in zip(works, measured.heads, strict=True)
    }
    server = _device(sum(work.tail_flops * work.steps for work in works) / measured.tail_s, link)
    each_s = training.micro_batches * link.handling_s / 2  # head and tail half of it
    works = [
        replace(
            work,
            forward_flops=work.forward_flops + each_s * devices[work.client].flops_per_s,
            tail_flops=work.tail_flops + each_s * server.flops_per_s,
        )
        for work in works
    ]
    workload = costs_of(deployment, training).workload
    return play_round(works, devices, server, workload=workload).duration_s / measured.steps


def handling_of(measured: Measured, link: Link) -> float:
    """Seconds of a step beside compute and transfer, of a round of whole batches."""
    moved_s = _bytes_over_rate_s(*_bytes_of(measured.heads, measured.steps), link)
    computed_s = (fmean(head.compute_s for head in measured.heads) + measured.tail_s) / measured.steps
    return max(0.0, measured.step_s - computed_s - moved_s - 2 * link.latency_s)


def _bytes_of(heads: Sequence[HeadRound], steps: int) -> tuple[float, float]:
    """Bytes of a step up and down, mean over the heads."""
    return fmean(head.bytes_up for head in heads) / steps, fmean(head.bytes_down for head in heads) / steps


def _bytes_over_rate_s(up: float, down: float, link: Link) -> float:
    """The least that they can take, one after the other."""
    return up / (link.rates.up_mbit_s * BYTES_PER_S) + down / (link.rates.down_mbit_s * BYTES_PER_S)


def in_proportion(deployment: Deployment, training: TrainingConfig, measured: Measured) -> Rates:
    """A link as slow as this machine is: it takes as long beside the compute `measured` as in `IN_PROPORTION_TO`.

    There devices and links are scaled to the model; all of it is slowed down to the pace of this machine.
    """
    setting, costs = SETTINGS[IN_PROPORTION_TO], costs_of(deployment, training)
    device, server = setting.devices(costs)[deployment.clients[0]], setting.server(costs)
    work, head = work_of(deployment, training, measured)[0], measured.heads[0]
    stated_s = (work.forward_flops + work.backward_flops) / device.flops_per_s + work.tail_flops / server.flops_per_s
    here_s = (head.compute_s + measured.tail_s / deployment.heads) / measured.steps
    slowed = stated_s / here_s / BYTES_PER_S
    return Rates(device.uplink_bytes_per_s * slowed, device.downlink_bytes_per_s * slowed)


def row_of(
    deployment: Deployment, name: str, technique: Technique, training: TrainingConfig, link: Link,
    repeats: Sequence[Measured],
) -> Row:  # fmt: skip
    """One row: means over steps, heads and repeats."""
    measured_s = fmean(one.step_s for one in repeats)
    predicted_s = fmean(predicted_step_s(deployment, training, one, link) for one in repeats)
    heads = [head for one in repeats for head in one.heads]
    steps = repeats[0].steps
    up, down = _bytes_of(heads, steps)
    works = [work for one in repeats for work in work_of(deployment, training, one)]
    predicted_bytes = fmean(work.step_bytes_up + work.step_bytes_down for work in works)
    head_s = fmean(head.compute_s for head in heads) / steps
    tail_s = fmean(one.tail_s for one in repeats) / steps
    limit_s = _bytes_over_rate_s(up, down, link)
    return {
        "model": deployment.model,
        "cut": deployment.cut,
        "heads": deployment.heads,
        "link": link.name,
        "technique": name,
        "training": dict(technique.training),
        "padding_travels": technique.padding_travels,
        "steps": steps * len(repeats),
        "measured_s": measured_s,
        "predicted_s": predicted_s,
        "prediction_error": predicted_s / measured_s - 1,
        "measured_each_s": [one.step_s for one in repeats],
        "bytes_per_step": up + down,
        "bytes_up": up,
        "bytes_down": down,
        "predicted_bytes": predicted_bytes,
        "full_batch_bytes": _full_batch_bytes(deployment, training, heads),
        "bytes_over_payload": (up + down) / _payload_bytes(deployment, training, heads),
        "head_s": head_s,
        "tail_s": tail_s,
        "exchange_s": fmean(head.exchange_s for head in heads) / steps,
        "bytes_over_rate_s": limit_s,
        "beyond_s": measured_s - head_s - tail_s - limit_s,
    }


def add_speedups(rows: Sequence[Row], baseline: str) -> None:
    """To every row, how many times sooner it is than `baseline` on the same model and link: median over the repeats."""
    places = {(row["model"], row["link"]): row["measured_each_s"] for row in rows if row["technique"] == baseline}
    for row in rows:
        each = zip(places[row["model"], row["link"]], row["measured_each_s"], strict=True)
        row["speedup_over_bf16"] = median(before / now for before, now in each)


def summary(rows: Sequence[Row], links: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that are aimed at."""
    speedups: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        of_link = speedups.setdefault(row["model"], {}).setdefault(row["link"], {})
        of_link[row["technique"]] = row["speedup_over_bf16"]
    byte_errors = [round(abs(row["bytes_per_step"] / row["predicted_bytes"] - 1), 12) for row in rows]  # of means
    rate_errors = [abs(link[key]) for link in links for key in ("up_rate_error", "down_rate_error") if key in link]
    return {
        "worst_prediction_error": max(abs(row["prediction_error"]) for row in rows),
        "worst_rate_error": max(rate_errors, default=None),
        "worst_byte_error": max(byte_errors),
        "speedup_over_bf16": speedups,
    }


HEADINGS = (
    f"{'model':13}{'link':14}{'technique':14}{'s/step':>9}{'predicted':>11}{'error':>8}{'bytes/step':>12}"
    f"{'/payload':>10}{'head s':>8}{'tail s':>8}{'bytes/rate':>12}{'beyond ms':>11}"
)


def line_of(row: Row) -> str:
    """The row below `HEADINGS`."""
    return (
        f"{row['model']:13}{row['link']:14}{row['technique']:14}{row['measured_s']:>9.3f}"
        f"{row['predicted_s']:>11.3f}{row['prediction_error']:>+8.1%}"
        f"{row['bytes_per_step']:>12,.0f}{row['bytes_over_payload']:>10.3f}"
        f"{row['head_s']:>8.3f}{row['tail_s']:>8.3f}{row['bytes_over_rate_s']:>12.4f}{1000 * row['beyond_s']:>11.1f}"
    )


def _device(flops_per_s: float, link: Link) -> Budget:
    up, down = link.rates.up_mbit_s * BYTES_PER_S, link.rates.down_mbit_s * BYTES_PER_S
    return Budget(1, flops_per_s, up, down, link.latency_s)


def _full_batch_bytes(deployment: Deployment, training: TrainingConfig, heads: Sequence[HeadRound]) -> float:
    """Bytes of a step, both ways, if all positions traveled and were targets."""
    costs = costs_of(deployment, training)
    load, H = costs.workload, costs.hidden_size

    def of_part(form: BatchForm) -> int:
        full = BatchForm.largest(form.rows, form.width)
        return frame_bytes.step_bytes_up(load, H, full) + frame_bytes.step_bytes_down(load, H, full)

    return fmean(sum(map(of_part, parts)) for head in heads for parts in head.forms)


def _payload_bytes(deployment: Deployment, training: TrainingConfig, heads: Sequence[HeadRound]) -> float:
    """Positions that travel x hidden size x bits / 8 of a step, both ways."""
    bits = BITS[training.activation_codec] + BITS[training.gradient_codec]
    positions = fmean(sum(form.positions for form in parts) for head in heads for parts in head.forms)
    return positions * costs_of(deployment, training).hidden_size * bits / 8
