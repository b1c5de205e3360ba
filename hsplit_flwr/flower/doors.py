"""The tail's door in a Flower run: a gRPC service beside Flower's own connections."""

import logging
from dataclasses import replace

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_server import Door, OpenDoor
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.tail import SharedTail

_log = logging.getLogger("hsplit_flwr")


def grpc_door(service: ServiceConfig, training: TrainingConfig) -> OpenDoor:
    """A way to open a gRPC service, with the codecs that heads train by."""
    config = replace(service, activation_codec=training.activation_codec, gradient_codec=training.gradient_codec)

    def open_door(tail: SharedTail, model: GlobalModel, run: str) -> Door:
        door = TailService(tail, model.since, run, config)
        _log.info("the tail listens on %s for heads; Flower's own messages take Flower's connections", door.address)
        return door

    return open_door
