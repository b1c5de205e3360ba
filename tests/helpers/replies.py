"""What a tail answers."""

from torch import Tensor

from hsplit_flwr.training.session import StepReply


def gradient_of(reply: StepReply) -> Tensor:
    """The gradient of `reply`, which must have one: heads that train nothing are sent none."""
    assert reply.gradient is not None
    return reply.gradient
