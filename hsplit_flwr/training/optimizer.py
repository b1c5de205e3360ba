"""One optimizer step as heads, tail and the monolithic reference all take it.

A new optimizer is a row of `OPTIMIZERS`, for instance::

    "adafactor": lambda parameters, config: torch.optim.Adafactor(parameters, weight_decay=config.weight_decay)
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError, ExchangeError

if TYPE_CHECKING:
    from hsplit_flwr.training.config import TrainingConfig

Factory = Callable[[list[nn.Parameter], "TrainingConfig"], torch.optim.Optimizer]
"""(parameters, settings) -> what steps them; its learning rate is set anew before every step, and all it remembers it
remembers parameter by parameter"""
OPTIMIZERS: dict[str, Factory] = {
    "adamw": lambda parameters, config: torch.optim.AdamW(parameters, weight_decay=config.weight_decay),
    "adamw_8bit": lambda parameters, config: _adamw_8bit(parameters, config),
}
"""`TrainingConfig.optimizer` -> how it is made"""


def _adamw_8bit(parameters: list[nn.Parameter], config: "TrainingConfig") -> torch.optim.Optimizer:
    """AdamW whose moments are kept in 8 bits, by blocks; those of factors below 4,096 values stay float32."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f'Expected the package bitsandbytes for optimizer = "adamw_8bit", found: {error}. '
            "Run: pip install 'hsplit_flwr[quantized]', or set optimizer = \"adamw\"."
        ) from error
    made: torch.optim.Optimizer = AdamW8bit(parameters, weight_decay=config.weight_decay)
    return made


class Optimizer:
    """An optimizer of `OPTIMIZERS` over `parameters`, with the run's learning-rate schedule and gradient clipping."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: "TrainingConfig") -> None:
        self._parameters = list(parameters)
        self._config = config
        # An optimizer of nothing is legal: every rank of a client may be 0.
        self._inner = OPTIMIZERS[config.optimizer](self._parameters, config) if self._parameters else None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if self._inner:
            self._inner.zero_grad(set_to_none=True)

    def adopt(self, former: "Optimizer", parameters: Iterable[nn.Parameter]) -> None:
        """Take over what `former` remembers of `parameters` (AdamW: its moments)."""
        if self._inner and former._inner:
            states = former._inner.state
            self._inner.state.update({parameter: states[parameter] for parameter in parameters if parameter in states})

    def restart(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forget all that is remembered of `parameters` (AdamW: its moments)."""
        if self._inner:
            for parameter in parameters:
                self._inner.state.pop(parameter, None)

    def step(self, run_step: int) -> None:
        """Clip and apply the gradients with the learning rate of run step `run_step` (0-based).

        Raises:
            ExchangeError: ``non_finite`` gradients; nothing is changed.
        """
        if not self._inner:
            return
        limit = self._config.max_grad_norm or math.inf
        try:
            torch.nn.utils.clip_grad_norm_(self._parameters, limit, error_if_nonfinite=True)
        except RuntimeError as error:
            raise ExchangeError(
                "non_finite", "Expected finite adapter gradients, found NaN or Inf. Lower the learning rate."
            ) from error
        for group in self._inner.param_groups:
            group["lr"] = self._config.learning_rate_at(run_step)
        self._inner.step()

    def state(self) -> State:
        """Copies of what is remembered, by the index of the parameter; one that was not stepped yet is absent."""
        remembered = self._inner.state_dict()["state"] if self._inner else {}
        return {
            "optimizer": self._config.optimizer,
            "parameters": {
                str(index): {"shape": list(self._parameters[index].shape), "values": _copies(values)}
                for index, values in remembered.items()
            },
        }

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave.

        Raises:
            ConfigError: it is of another optimizer, or of parameters of other shapes.
        """
        if state["optimizer"] != self._config.optimizer:
            raise ConfigError(
                f"Expected the state of optimizer {self._config.optimizer!r}, found that of {state['optimizer']!r}. "
                "Resume with the settings of the run that saved it."
            )
        for index, saved in state["parameters"].items():
            shape = list(self._parameters[int(index)].shape) if int(index) < len(self._parameters) else None
            if shape != saved["shape"]:
                raise ConfigError(
                    f"Expected the optimizer's state of a parameter {shape} at {index}, found {saved['shape']}. "
                    "Resume with the plans of the run that saved it."
                )
        if self._inner:
            remembered = {int(index): _copies(saved["values"]) for index, saved in state["parameters"].items()}
            # torch's own: it knows which values belong on the parameter's device, and which do not.
            self._inner.load_state_dict({**self._inner.state_dict(), "state": remembered})


def _copies(values: State) -> State:
    return {key: _copy(value) for key, value in values.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return _copies(value) if isinstance(value, dict) else value
