"""The quickstart's clients; client 0 waits where it is to be hit, and says so."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context
from quickstart.task import FOLDER, MODEL, client_data

from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.trained_head import Refusal, TrainedHead
from hsplit_flwr.flower.client_node import ClientNode, Config, Scored
from hsplit_flwr.flower.client_settings import RunConfig, count_clients, get, hosted_clients
from hsplit_flwr.flower.message_client import client_app
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.training.batch import Batch

VICTIM = "0"
FOLDER_VARIABLE = "HSPLIT_FAULTS"
"""environment: the folder in which `hold` names a round and a phase, and client 0 leaves a file of the phase's name"""
HOLD_S = 1.0


def reach(phase: str, client: str, round_number: int) -> None:
    """Say that `client` is there and wait, where that is asked for; once, so that who trains it again does not wait."""
    hold, mark = (Path(os.environ[FOLDER_VARIABLE], name) for name in ("hold", phase))
    if client == VICTIM and hold.read_text() == f"{round_number} {phase}" and not mark.exists():
        mark.touch()
        time.sleep(HOLD_S)


class MarkedNode(ClientNode):
    """Clients that say when they begin a round and when they have finished it."""

    local_steps: int
    round_number = 0

    def train(self, config: Config) -> TrainedHead | Refusal:
        """See `ClientNode.train`."""
        task = RoundTask.from_json(str(config[TASK_KEY]))
        reach("load", task.client, task.round)
        trained = super().train(config)
        reach("upload", task.client, task.round)
        return trained

    def score(self, config: Config) -> Scored:
        """See `ClientNode.score`."""
        self.round_number = RoundTask.from_json(str(config[TASK_KEY])).round
        return super().score(config)

    def data_of(self, run_config: RunConfig, num_clients: int, client: str) -> ClientData:
        """The quickstart's, whose batches say when they are asked for."""
        data = client_data(client, num_clients, run_config)
        return replace(data, train=partial(self._training, data, client), evaluate=self._scoring(data, client))

    def _training(self, data: ClientData, client: str, first_step: int) -> Iterator[Batch]:
        places = {0: "first-step", self.local_steps // 2: "mid-round"}
        round_number = first_step // self.local_steps + 1
        for step, batch in enumerate(data.training_batches(first_step)):
            if step in places:
                reach(places[step], client, round_number)
            yield batch

    def _scoring(self, data: ClientData, client: str) -> Iterable[Batch]:
        for number, batch in enumerate(data.evaluate):
            if number == 0:
                reach("evaluation", client, self.round_number)
            yield batch


def node(context: Context) -> ClientNode:
    """The clients that this SuperNode hosts."""
    num_clients = count_clients(context.run_config, context.node_config, FOLDER)
    clients = hosted_clients(context.node_config, num_clients)
    made: MarkedNode = MarkedNode(
        MODEL, lambda client: made.data_of(context.run_config, num_clients, client), context, client_ids=clients
    )
    made.local_steps = get(context.run_config, "local-steps", 12)
    return made


app = client_app(node)
