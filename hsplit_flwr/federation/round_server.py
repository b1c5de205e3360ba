"""A round on the server, whoever carries the messages."""

from dataclasses import dataclass

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES


@dataclass(frozen=True)
class StrategyConfig:
    """What a run does besides training steps."""

    rule: str = EXACT_RULE
    """aggregation rule, one of `aggregation.RULES`"""
    min_nodes: int = 1
    """a round starts once so many SuperNodes are connected"""
    fraction_clients: float = 1.0
    """share of the known clients that train in a round"""
    federated_evaluation: bool = True
    """score the clients' held-out data after every round"""
    round_limit_s: float = 600.0
    """longest a client's stream may last"""
    wait_for_nodes_s: float = 300.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"Expected an aggregation rule among {sorted(RULES)}, found {self.rule!r}.")
        if not 0 < self.fraction_clients <= 1:
            raise ConfigError(f"Expected 0 < fraction_clients <= 1, found {self.fraction_clients}.")
        if self.min_nodes < 1 or not min(self.round_limit_s, self.wait_for_nodes_s) > 0:
            raise ConfigError(f"Expected min_nodes >= 1 and limits > 0 s, found {self}.")
