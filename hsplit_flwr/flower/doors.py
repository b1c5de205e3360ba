"""The tail's door in a Flower run: a gRPC service beside Flower's own connections."""

import logging
from dataclasses import replace
from typing import Unpack

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.federation.door import Door
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import RoundOptions
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.planning.plans import Plans
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.tail import SharedTail

_log = logging.getLogger("hsplit_flwr")


def flower_rounds(
    model: GlobalModel,
    plans: Plans,
    training: TrainingConfig,
    service: ServiceConfig | None,
    **options: Unpack[RoundOptions],
) -> RoundServer:
    """The rounds of a strategy, whose heads reach the tail over `service` (raises as `RoundServer`)."""
    given, limits = service or ServiceConfig(), options.get("limits") or BarrierLimits()
    config = replace(
        given,
        activation_codec=training.activation_codec,
        gradient_codec=training.gradient_codec,
        frames_ahead=training.parts_in_flight - 1,
        reconnect_grace_s=limits.reconnect_grace_s,
        activation_cache_bytes=training.activation_cache_mib << 20,
    )

    def open_door(tail: SharedTail, model: GlobalModel, run: str) -> Door:
        door = TailService(tail, model.since, run, config)
        _log.info("the tail listens on %s for heads; Flower's own messages take Flower's connections", door.address)
        return door

    return RoundServer(model, plans, training, open_door, max_frame_bytes=config.max_frame_bytes, **options)
