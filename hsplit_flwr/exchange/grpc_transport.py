"""Placeholder until the transports are cut."""

from typing import Any

from hsplit_flwr.exchange.tail_service import ServiceConfig as ServiceConfig


def connect(root_certificates: bytes | None = None) -> Any:
    """Placeholder."""
