"""The legacy face of a client: a `NumPyClient` that trains the head of its plan against the Strategy's tail.

One Flower `fit` is one round: load the head, bring its weights up to date, stream the steps, return the adapters.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Context
from flwr.client import NumPyClient

from hsplit_flwr.exchange.tls_files import ClientTls
from hsplit_flwr.exchange.turns import Said
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.trained_head import Refusal
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.messages import ARRAYS_KEY, CLIENT_KEY, pack_answer, pack_said, pack_trained
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.training.workload import PLAIN

NDArrays = list[Any]
Config = dict[str, Any]


class HSplitLoRAClient(NumPyClient):
    """A client of `HSplitLoRAStrategy`. Arguments and errors are those of `ClientNode`."""

    def __init__(
        self,
        model: str,
        data: ClientData | Callable[[str], ClientData],
        context: Context,
        *,
        client_ids: Sequence[str] | None = None,
        dtype: str = "fp32",
        quantization: str = PLAIN,
        attn_implementation: str = "auto",
        device: str = "auto",
        tls: ClientTls | None = None,
        budgets: Callable[[str, int], Budget] | None = None,
    ) -> None:
        self._node = ClientNode(
            model,
            data,
            context,
            client_ids=client_ids,
            dtype=dtype,
            quantization=quantization,
            attn_implementation=attn_implementation,
            device=device,
            tls=tls,
            budgets=budgets,
        )

    def get_properties(self, config: Config) -> Config:
        """Figures of the node (`ClientNode.answer`)."""
        return pack_answer(self._node.answer(config))

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Config]:
        """One round of training; returns the arrays of the trained head, its tokens, and figures with their names.

        A head beyond the client's budget is not loaded: no arrays, and the reason under ``refused``.
        Raises as `ClientNode.train`.
        """
        trained = self._node.train(config)
        if isinstance(trained, Said):
            return [], 0, pack_said(trained)
        arrays, figures = pack_trained(trained)
        tokens = 0 if isinstance(trained, Refusal) else trained.tokens
        return list(arrays.values()), tokens, {**figures, ARRAYS_KEY: json.dumps(list(arrays))}

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Config]:
        """Loss of the held-out batches, their target tokens, and who was scored (raises as `ClientNode.score`)."""
        scored = self._node.score(config)
        if isinstance(scored, Said):
            return 0.0, 0, pack_said(scored)
        return scored.loss, scored.tokens, {CLIENT_KEY: scored.client}
