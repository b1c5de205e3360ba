"""A head's adapters from one round to a later one: where the next one goes on, module by module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from hsplit_flwr.common.state import State
from hsplit_flwr.lora.deltas import factors_from_state, factors_to_state
from hsplit_flwr.lora.factors import LoraFactors, alike
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.training.optimizer import Optimizer


@dataclass(frozen=True)
class KeptAdapters:
    """Adapters as a round left them, and what the optimizer remembers of them."""

    round_number: int
    """of that round"""
    factors: Mapping[str, LoraFactors]
    """by whole-model module name"""
    optimizer: str
    """one of `optimizer.OPTIMIZERS`"""
    remembered: Mapping[str, Mapping[str, State]]
    """module name -> what the optimizer's state has of its ``A`` and ``B``; absent: not stepped yet"""

    @classmethod
    def of(cls, round_number: int, adapters: SegmentAdapters, optimizer: Optimizer) -> Self:
        """Copies of `adapters` and of what `optimizer`, which is over all their parameters, remembers."""
        state = optimizer.state()
        remembered: dict[str, dict[str, State]] = {}
        for index, values in state["parameters"].items():
            module, factor = divmod(int(index), 2)
            remembered.setdefault(adapters.module_names[module], {})["AB"[factor]] = values
        return cls(round_number, adapters.factors(), state["optimizer"], remembered)

    def state(self) -> State:
        """All of it; `of_state` takes it back."""
        return {
            "round": self.round_number,
            "factors": {name: factors_to_state(pair) for name, pair in self.factors.items()},
            "optimizer": self.optimizer,
            "remembered": {name: dict(values) for name, values in self.remembered.items()},
        }

    @classmethod
    def of_state(cls, state: State) -> Self:
        """What gave this `state`."""
        factors = {name: factors_from_state(saved) for name, saved in state["factors"].items()}
        return cls(state["round"], factors, state["optimizer"], state["remembered"])

    def resume(self, adapters: SegmentAdapters, optimizer: Optimizer) -> dict[str, LoraFactors]:
        """Make `adapters` and `optimizer` go on where rank and scaling are the same; returns what those start from.

        All others stay as they are.

        Raises:
            ConfigError: another optimizer.
        """
        fresh = adapters.factors()
        start = {name: pair for name, pair in self.factors.items() if name in fresh and alike(pair, fresh[name])}
        adapters.set({**fresh, **start})
        remembered = {
            str(2 * index + "AB".index(factor)): values
            for index, name in enumerate(adapters.module_names)
            if name in start
            for factor, values in self.remembered.get(name, {}).items()
        }
        optimizer.load_state({"optimizer": self.optimizer, "parameters": remembered})
        return start
