"""Our log lines where Flower's go."""

import logging


def log_through_flower() -> None:
    """Let our log lines go to the console and to `flwr run --stream`, as Flower's own."""
    ours, flower = logging.getLogger("hsplit_flwr"), logging.getLogger("flwr")
    ours.setLevel(logging.INFO)
    for handler in flower.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
