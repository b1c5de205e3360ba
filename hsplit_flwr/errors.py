"""Every error this package raises for bad input: what was expected, what was found, what to do."""


class HSplitError(Exception):
    """Base of all errors that hsplit_flwr raises on purpose."""


class UnsupportedModelError(HSplitError, ValueError):
    """The model cannot be cut: the message says which part was not found."""


class ConfigError(HSplitError, ValueError):
    """A configured value is out of range or contradicts another one."""


class AggregationError(HSplitError, ValueError):
    """Adapters, weights or increments that do not fit together."""


class RunFailedError(HSplitError):
    """A run came to nothing, or cannot go on: the message says why."""


class ExchangeError(HSplitError):
    """A frame or a stream between a head and the tail was refused.

    ``code`` is stable and travels over the wire (docs/exchange.md lists them); the message is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message
