"""Placeholder until the transports are cut."""

from typing import Any

Connect = Any
