"""Where this package keeps what can be had again: the user's cache."""

import os
from pathlib import Path

CACHE_VARIABLE = "HSPLIT_FLWR_CACHE"


def cache_folder() -> Path:
    """``$HSPLIT_FLWR_CACHE``, by default ``~/.cache/hsplit_flwr``."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/hsplit_flwr").expanduser()
