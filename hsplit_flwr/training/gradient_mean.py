"""Gradients of a batch that comes in parts: those of the mean loss of all its target tokens."""

from collections.abc import Sequence

from torch import Tensor, nn


class GradientMean:
    """The token-weighted mean of the gradients of several parts' mean losses. One part alone is not touched.

    Args:
        parameters: whose ``.grad`` is collected and given back.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._gradients: list[Tensor | None] = []
        self.tokens = 0
        """target tokens of all parts so far"""

    def add(self, tokens: int) -> None:
        """Take the gradients of a part of so many target tokens out of the parameters."""
        taken = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        if not self._gradients:
            self._gradients, self.tokens = taken, tokens
            return
        total = self.tokens + tokens
        share = tokens / total if total else 0.0
        self._gradients = [_mixed(old, new, share) for old, new in zip(self._gradients, taken, strict=True)]
        self.tokens = total

    def put(self) -> None:
        """Make the mean the gradients of the parameters."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient


def _mixed(old: Tensor | None, new: Tensor | None, share: float) -> Tensor | None:
    """``(1 - share) * old + share * new``, in the memory of `old` where there is one."""
    if old is None:
        return None if new is None else new.mul_(share)
    old.mul_(1.0 - share)
    return old if new is None else old.add_(new, alpha=share)
