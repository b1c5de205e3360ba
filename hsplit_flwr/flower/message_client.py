"""The Message API's face of a client: a `ClientApp` with ``train``, ``evaluate`` and ``query``."""

from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from hsplit_flwr.exchange.turns import Said
from hsplit_flwr.federation.trained_head import TrainedHead
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.messages import CLIENT_KEY, pack_answer, pack_said, pack_trained

CONFIG, ARRAYS, METRICS = "config", "arrays", "metrics"
"""the records of a message, by Flower's own names"""


def client_app(node: Callable[[Context], ClientNode]) -> ClientApp:
    """A ClientApp for `HSplitLoRAMessageStrategy`: ``app = client_app(lambda context: ClientNode(...))``.

    Args:
        node: Flower's context -> the clients that this node hosts; called for every message.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        answer = node(context).answer(config_of(message))
        return _reply(message, pack_answer(answer))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained = node(context).train(config_of(message))
        if isinstance(trained, Said):
            return _reply(message, pack_said(trained))
        arrays, figures = pack_trained(trained)
        records: dict[str, Any] = {ARRAYS: ArrayRecord({name: Array(array) for name, array in arrays.items()})}
        if isinstance(trained, TrainedHead):
            records[METRICS] = MetricRecord({"loss": trained.loss, "num-examples": trained.tokens})
        return _reply(message, figures, records)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        scored = node(context).score(config_of(message))
        if isinstance(scored, Said):
            return _reply(message, pack_said(scored))
        metrics = MetricRecord({"loss": scored.loss, "num-examples": scored.tokens})
        return _reply(message, {CLIENT_KEY: scored.client}, {METRICS: metrics})

    return app


def config_of(message: Message) -> dict[str, Any]:
    """The figures of a message; empty where it has none."""
    record = message.content.get(CONFIG)
    return dict(record) if isinstance(record, ConfigRecord) else {}


def _reply(message: Message, figures: dict[str, Any], records: dict[str, Any] | None = None) -> Message:
    return Message(RecordDict({CONFIG: ConfigRecord(figures), **(records or {})}), reply_to=message)
