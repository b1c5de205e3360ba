"""Placeholder until admission is cut."""

from hsplit_flwr.exchange.tail_service import Ticket as Ticket
