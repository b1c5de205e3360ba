"""``/metrics`` and ``/healthz`` of a run: what the tail does, who takes part, and how far the run is.

Metrics are in the Prometheus text format, by `prometheus_client` (extra ``metrics``).
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.traffic import TrafficFigures
from hsplit_flwr.federation.http_port import HttpPort, Page
from hsplit_flwr.reports.best_round import best_round
from hsplit_flwr.training.activity import TailActivity

if TYPE_CHECKING:
    from prometheus_client import Metric

    from hsplit_flwr.federation.round_server import RoundServer

KEY = "metrics-bind"
NO_TRAFFIC = TrafficFigures(0, 0, 0, 0, {})


class TailMetrics:
    """The metrics port of a run, open until `stop`.

    Args:
        server: whose run it is.
        bind: see `HttpPort`.
        step_limit_s: a step that takes longer is a failure of the tail's health.

    Raises:
        ConfigError: `prometheus_client` is not there, or the address cannot be bound.
    """

    def __init__(self, server: "RoundServer", bind: str, step_limit_s: float) -> None:
        try:
            from prometheus_client import CollectorRegistry, generate_latest
            from prometheus_client.exposition import CONTENT_TYPE_LATEST
        except ImportError as error:
            raise ConfigError(
                f'Expected prometheus_client where {KEY} is set, found none. Install "hsplit_flwr[metrics]", or leave '
                f"{KEY} empty."
            ) from error
        self._server = server
        self._step_limit_s = step_limit_s
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        pages = {
            "/metrics": lambda: Page(generate_latest(registry), CONTENT_TYPE_LATEST),
            "/healthz": self._health,
        }
        self._port = HttpPort(bind, pages, KEY)
        self.address = self._port.address

    def stop(self) -> None:
        """Serve nothing any more."""
        self._port.stop()

    def describe(self) -> list["Metric"]:
        """Nothing beforehand: `collect` says it all."""
        return []

    def collect(self) -> Iterator["Metric"]:
        """The figures of this moment, by families."""
        server = self._server
        yield from _run_families(server)
        yield from _tail_families(server.tail_rounds.tail.activity())
        yield from _traffic_families(server.traffic or NO_TRAFFIC)
        yield _gauge("resident_memory_bytes", "memory of the server's process", psutil.Process().memory_info().rss)
        device = server.tail_rounds.tail.device
        if device.type == "cuda":
            import torch

            yield _gauge("gpu_memory_bytes", "tensors on the tail's device", torch.cuda.memory_allocated(device))

    def _health(self) -> Page:
        """200 while the run can go on, 503 with the reason where it cannot."""
        activity = self._server.tail_rounds.tail.activity()
        reason = activity.failure
        if activity.doing == "computing" and activity.doing_s > self._step_limit_s:
            reason = f"a step has taken {activity.doing_s:.0f} s, longer than step-limit-s = {self._step_limit_s:g}"
        told = {
            "status": "failed" if reason else "ok",
            "reason": reason,
            "round": self._server.round_number,
            "rounds": self._server.training.rounds,
            "doing": activity.doing,
            "doing_s": round(activity.doing_s, 3),
            "clients": activity.clients._asdict(),
        }
        return Page((json.dumps(told) + "\n").encode(), "application/json", 503 if reason else 200)


def _run_families(server: "RoundServer") -> Iterator["Metric"]:
    yield _gauge("round", "the round under way, or the last one", server.round_number)
    yield _gauge("rounds", "rounds of the run", server.training.rounds)
    history = list(server.history)
    failed = sum(len(record.failures) for record in history)
    yield _counter("incidents", "clients that failed, were left out or late, over the rounds", failed)
    yield _counter(
        "trained_tokens", "target tokens of clients that finished their rounds", sum(r.tokens for r in history)
    )
    perplexities = _labelled("perplexity", "held-out perplexity after the last round that was scored", "measured_on")
    for place in ("central", "federated"):
        scored = [value for record in history if (value := getattr(record, f"{place}_perplexity")) is not None]
        if scored:
            perplexities.add_metric([place], scored[-1])
    yield perplexities
    if losses := [record.train_loss for record in history if record.train_loss is not None]:
        yield _gauge("train_loss", "mean training loss of the last round, nats per token", losses[-1])
    if best := best_round(history):
        yield _gauge("best_round", "the round with the lowest held-out perplexity", best.round)
        yield _gauge("best_perplexity", "its perplexity", best.perplexity)


def _tail_families(activity: TailActivity) -> Iterator["Metric"]:
    clients = _labelled("clients", "of the open round: to come, taking part, and of these waiting for a turn", "state")
    for state, count in activity.clients._asdict().items():
        clients.add_metric([state], count)
    yield clients
    yield _counter("steps", "steps of the tail that all who take part had their turn in", activity.steps)
    yield _counter("batches", "clients' batches that were answered", activity.batches)
    yield _counter("tokens", "target tokens in these batches", activity.tokens)
    seconds = _labelled("tail_seconds", "time of the tail's worker, by what it did", "doing", counter=True)
    for doing, spent in activity.seconds.items():
        seconds.add_metric([doing], spent)
    yield seconds
    yield _gauge("tail_ok", "0: the tail's worker ended with an error", float(not activity.failure))


def _traffic_families(traffic: TrafficFigures) -> Iterator["Metric"]:
    yield _gauge("streams", "open streams of clients", traffic.streams)
    yield _counter("admitted_streams", "streams that were let in, returning clients included", traffic.admitted)
    yield _counter("received_bytes", "frames of clients", traffic.bytes_up)
    yield _counter("sent_bytes", "frames for clients", traffic.bytes_down)
    refusals = _labelled("refusals", "streams that ended with an error, by its code", "code", counter=True)
    for code, count in sorted(traffic.refusals.items()):
        refusals.add_metric([code], count)
    yield refusals


def _gauge(name: str, meaning: str, value: float) -> "Metric":
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(f"hsplit_{name}", meaning, value)


def _counter(name: str, meaning: str, value: float) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"hsplit_{name}", meaning, value)


def _labelled(name: str, meaning: str, label: str, *, counter: bool = False) -> Any:
    """A family with a value for every value of `label`."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family = CounterMetricFamily if counter else GaugeMetricFamily
    return family(f"hsplit_{name}", meaning, labels=[label])
