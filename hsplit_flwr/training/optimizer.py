"""One optimizer step as heads, tail and the monolithic reference all take it."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.training.config import TrainingConfig


class Optimizer:
    """AdamW over `parameters` with the run's learning-rate schedule and gradient clipping."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainingConfig) -> None:
        self._parameters = list(parameters)
        self._config = config
        # An optimizer of nothing is legal: every rank of a client may be 0.
        self._adamw = (
            torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
            if self._parameters
            else None
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        if self._adamw:
            self._adamw.zero_grad(set_to_none=True)

    def adopt(self, former: "Optimizer", parameters: Iterable[nn.Parameter]) -> None:
        """Go on with these where `former` was: AdamW takes over its moments of them."""
        if self._adamw and former._adamw:
            states = former._adamw.state
            self._adamw.state.update({parameter: states[parameter] for parameter in parameters if parameter in states})

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start afresh with these: AdamW forgets its moments of them."""
        if self._adamw:
            for parameter in parameters:
                self._adamw.state.pop(parameter, None)

    def step(self, run_step: int) -> None:
        """Clip and apply the gradients with the learning rate of run step `run_step` (0-based).

        Raises:
            ExchangeError: ``non_finite`` gradients; nothing is changed.
        """
        if not self._adamw:
            return
        limit = self._config.max_grad_norm or math.inf
        try:
            torch.nn.utils.clip_grad_norm_(self._parameters, limit, error_if_nonfinite=True)
        except RuntimeError as error:
            raise ExchangeError(
                "non_finite", "Expected finite adapter gradients, found NaN or Inf. Lower the learning rate."
            ) from error
        for group in self._adamw.param_groups:
            group["lr"] = self._config.learning_rate_at(run_step)
        self._adamw.step()
