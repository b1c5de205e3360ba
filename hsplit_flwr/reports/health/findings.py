"""How a health sign is told: its causes, its finding, its figures in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hsplit_flwr.common.tables import format_seconds
from hsplit_flwr.reports.health.records import Finding


@dataclass(frozen=True)
class Cause:
    """A measured cause and what to do about it."""

    why: str
    remedy: str


def judged(sign: str, value: float, unit: str, measured: str, causes: Sequence[Cause]) -> Finding:
    """A warning with its causes; without any, all is well."""
    why, remedy = "; ".join(cause.why for cause in causes), "; ".join(cause.remedy for cause in causes)
    return Finding(sign, "warning" if causes else "ok", value, unit, measured, why, remedy)


def not_measured(sign: str, what: str) -> Finding:
    """A finding that says what there was no figure for."""
    return Finding(sign, "not measured", None, "", f"not measured: {what}")


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def percent(share: float) -> str:
    """``"57 %"``; two digits below ten: ``"0.33 %"``."""
    return f"{100 * share:.2g} %" if abs(share) < 0.0995 else f"{100 * share:.0f} %"


def seconds(value: float) -> str:
    """``"12.5 s"``."""
    return f"{format_seconds(value)} s"
