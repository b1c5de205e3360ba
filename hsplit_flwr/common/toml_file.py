"""TOML files that people write, read with an error that says what was expected of them."""

import tomllib
from pathlib import Path
from typing import Any

from hsplit_flwr.errors import ConfigError


def read_toml(path: str | Path, content: str) -> dict[str, Any]:
    """The table in the file at `path`, which should hold `content` ("an experiment").

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"Expected a TOML file with {content} at {path}, found: {error}.") from error
