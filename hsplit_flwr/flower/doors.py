"""The tail's door in a Flower run: a gRPC service beside Flower's own connections."""

import logging
from dataclasses import replace
from typing import Unpack

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.turns import in_turns
from hsplit_flwr.federation.door import Door
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import RoundOptions
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.planning.exchange_choice import AUTO
from hsplit_flwr.planning.plans import Plans
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.tail import SharedTail

_log = logging.getLogger("hsplit_flwr")


_SLOW = (
    'the exchange goes over Flower\'s messages (exchange = "messages"), one a step and two a round beside them: exact, '
    "and slow. A message costs about 0.2 s in a simulation and some 10 s in a deployment, and the head's forward pass "
    "is computed twice. Let straggler-limit-s be longer than what a message of the slowest client takes."
)


def flower_rounds(
    model: GlobalModel,
    plans: Plans,
    training: TrainingConfig,
    service: ServiceConfig | None,
    **options: Unpack[RoundOptions],
) -> RoundServer:
    """The rounds of a strategy, whose heads reach the tail over `service` (raises as `RoundServer`)."""
    given, limits = service or ServiceConfig(), options.get("limits") or BarrierLimits()
    if in_turns(given.bind):
        _check_turns(training, plans)
        limits = options["limits"] = replace(limits, reconnect_grace_s=0.0)  # no connection can break
    config = replace(
        given,
        reconnect_grace_s=limits.reconnect_grace_s,
        activation_cache_bytes=training.activation_cache_mib << 20,
    )

    def open_door(tail: SharedTail, model: GlobalModel, run: str) -> Door:
        door = TailService(tail, model.since, run, config)
        if in_turns(door.address):
            _log.warning(_SLOW)
        else:
            _log.info("the tail listens on %s for heads; Flower's own messages take Flower's connections", door.address)
        return door

    return RoundServer(model, plans, training, open_door, max_frame_bytes=config.max_frame_bytes, **options)


def _check_turns(training: TrainingConfig, plans: Plans) -> None:
    """Refuse what an exchange over messages does not do.

    Raises:
        ConfigError: naming the key.
    """
    chosen = plans.chosen if isinstance(plans, AdaptivePlanning) else ()
    parts = "each message carries a whole batch"
    for key, found, expected, why in (
        ("micro-batches", AUTO if "micro_batches" in chosen else training.micro_batches, 1, parts),
        ("micro-steps", training.micro_steps, False, parts),
        ("activation-cache-mib", training.activation_cache_mib, 0, "a client is not told what the tail keeps"),
    ):
        if found != expected:
            raise ConfigError(
                f'Expected {key} = {expected!r} with exchange = "messages", where {why}, found {found!r}. '
                'Leave it out, or use exchange = "grpc".'
            )
