"""A federation in one process: real clients over real gRPC behind Flower's `ClientProxy`; no Ray, no SuperLink.

For experiments, notebooks and tests: the same strategy, clients and bytes as in a deployment, without its start-up.
`LocalNode` treats its clients as Flower does: built anew for every message, with a copy of the context that is kept
only if the message was answered.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from flwr.app import Context, RecordDict
from flwr.client import Client
from flwr.common import (
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    ReconnectIns,
)
from flwr.server.client_proxy import ClientProxy

from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.flower.client import HSplitLoRAClient
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.training.workload import PLAIN

Answer = TypeVar("Answer")


class LocalNode(ClientProxy):
    """A SuperNode in this process.

    Args:
        cid: a number as text, unique among the nodes.
        clients: ids of the clients it hosts.
        model: hub name, folder or GGUF file.
        data: client id -> its data.
        quantization: of the base, see `ClientNode`.
        budgets: (client id, round) -> what it can afford; None: as `node_config` states, or measured if need be.
        node_config: Flower's.
    """

    def __init__(
        self,
        cid: str,
        clients: Sequence[str],
        model: str | Path,
        data: Callable[[str], ClientData],
        *,
        quantization: str = PLAIN,
        budgets: Callable[[str, int], Budget] | None = None,
        node_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(cid)
        self._state_folder = TemporaryDirectory(prefix="hsplit-flwr-")  # what clients keep lives as long as the node
        config = {"state-dir": self._state_folder.name, **(node_config or {})}
        self.context = Context(1, int(cid), config, RecordDict(), {})
        self._clients = clients
        self._model = model
        self._data = data
        self._quantization = quantization
        self._budgets = budgets

    def get_properties(self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        """Asks a client."""
        return self._answer(lambda client: client.get_properties(ins))

    def get_parameters(self, ins: GetParametersIns, timeout: float | None, group_id: int | None) -> GetParametersRes:
        """Never asked: `HSplitLoRAStrategy` has no use for it."""
        raise NotImplementedError("the strategy does not ask for parameters")

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Asks a client."""
        return self._answer(lambda client: client.fit(ins))

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        """Asks a client."""
        return self._answer(lambda client: client.evaluate(ins))

    def reconnect(self, ins: ReconnectIns, timeout: float | None, group_id: int | None) -> DisconnectRes:
        """Nothing to end."""
        return DisconnectRes(reason="")

    def _answer(self, call: Callable[[Client], Answer]) -> Answer:
        context = copy.deepcopy(self.context)
        client = HSplitLoRAClient(
            str(self._model),
            self._data,
            context,
            client_ids=self._clients,
            quantization=self._quantization,
            budgets=self._budgets,
        )
        answer = call(client.to_client())
        self.context = context
        return answer


def run_federation(strategy: HSplitLoRAStrategy, nodes: Iterable[ClientProxy]) -> None:
    """All rounds of `strategy` with `nodes`, through Flower's own server loop; results are in ``strategy.history``."""
    server = HSplitLoRAServer(strategy)
    for node in nodes:
        server.client_manager().register(node)
    server.fit(num_rounds=strategy.rounds.training.rounds, timeout=strategy.rounds.config.round_limit_s)
