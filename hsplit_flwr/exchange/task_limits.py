"""What a client takes of a task, whatever a server says: limits that no honest run comes near.

A broken or malicious server must not make a client reserve memory, compute for years or wait for ever. What depends on
the model is checked where the model is known: the cut where its blocks are read, ranks where adapters are made.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hsplit_flwr.common.checks import is_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import is_literal

if TYPE_CHECKING:
    from hsplit_flwr.exchange.task import RoundTask

LONGEST_S = 366 * 24 * 3600.0
"""of a stream"""
MOST_OF_ANYTHING = 10**6
"""rounds, steps, rows, tokens of a row"""
MOST_FRAME_BYTES = 2**31 - 1
"""gRPC's own limit"""
MOST_BLOCKS = 10_000
MOST_RANK = 1 << 14
LARGEST_ALPHA = 1e6
LARGEST_RATE = 1e6
"""learning rate and weight decay"""
LARGEST_SEED = 2**63
LONGEST_TEXT = 4096
"""characters of an id, a token, an address, a module's name"""
MOST_MODULES = 1 << 14
"""entries of the patterns of a LoRA spec, and of its targets: as many compiled ones are kept"""


def check_lora_texts(lora: Mapping[str, Any]) -> None:
    """Refuse the JSON form of a LoRA spec whose texts could cost a client time, before anything is compiled.

    A regular expression may take longer than any round on a single name, so none travels: `LoraSpec.spelled_out`.

    Raises:
        ConfigError: too many or too long texts, or a pattern that is not a plain name (escaped).
    """
    patterns = {key for name in ("rank_pattern", "alpha_pattern") for key in dict(lora[name])}
    targets = lora["target_modules"]
    texts = [*patterns, *([targets] if isinstance(targets, str) else targets)]
    _require(len(texts) <= MOST_MODULES, "modules named in a LoRA spec", f"at most {MOST_MODULES}", len(texts))
    for text in texts:
        _require(isinstance(text, str) and len(text) <= LONGEST_TEXT, "a module's name", _TEXT, text)
    for key in patterns:
        _require(is_literal(key), "a pattern of a LoRA spec", "a module's name without regular expressions", key)


def check_task(task: "RoundTask") -> None:
    """Refuse a task with a figure that no honest run has.

    Raises:
        ConfigError: it has one; the message names the field, the limit and the figure.
    """
    for name in ("run", "client", "address", "token"):
        text = getattr(task, name)
        _require(isinstance(text, str) and len(text) <= LONGEST_TEXT, name, _TEXT, text)
    _whole("round", task.round, 0, MOST_OF_ANYTHING)
    _whole("kept_from", task.kept_from, 0, MOST_OF_ANYTHING)
    _whole("max_frame_bytes", task.max_frame_bytes, 1, MOST_FRAME_BYTES)
    _number("time_limit_s", task.time_limit_s, LONGEST_S)
    _require(task.time_limit_s > 0, "time_limit_s", "> 0 s", task.time_limit_s)
    _number("reconnect_grace_s", task.reconnect_grace_s, LONGEST_S)
    _check_plan(task)
    _check_training(asdict(task.training))
    for name, value in asdict(task.workload).items() if task.workload else ():
        if isinstance(value, float):
            _number(f"{name} of the workload", value, LARGEST_RATE)
        elif not isinstance(value, str | bool):
            _whole(f"{name} of the workload", value, 0, MOST_OF_ANYTHING)


def _check_plan(task: "RoundTask") -> None:
    lora = task.plan.lora
    _whole("cut", task.plan.cut, 1, MOST_BLOCKS)
    for rank in _values(lora.r, lora.rank_pattern):
        _whole("rank", rank, 0, MOST_RANK)
    for alpha in _values(lora.lora_alpha, lora.alpha_pattern):
        _number("lora_alpha", alpha, LARGEST_ALPHA)


def _check_training(training: dict[str, Any]) -> None:
    _whole("seed", training.pop("seed"), -LARGEST_SEED, LARGEST_SEED)
    for name, value in training.items():
        if isinstance(value, float):
            _number(name, value, LARGEST_RATE)
        elif not isinstance(value, str | bool):
            _whole(name, value, 0, MOST_OF_ANYTHING)


def _values(default: float, pattern: Mapping[str, float]) -> Iterable[float]:
    return (default, *pattern.values())


_TEXT = f"a text of at most {LONGEST_TEXT} characters"


def _whole(name: str, found: object, least: int, most: int) -> None:
    good = is_whole(found, least) and found <= most  # type: ignore[operator]
    _require(good, name, f"a whole number in {least}..{most}", found)


def _number(name: str, found: object, most: float) -> None:
    good = isinstance(found, int | float) and math.isfinite(found) and 0 <= found <= most
    _require(good, name, f"a number in 0..{most:g}", found)


def _require(good: bool, name: str, expected: str, found: object) -> None:
    if not good:
        raise ConfigError(
            f"Expected {name} of a task to be {expected}, found {found!r:.100}. "
            "The server is broken or not to be trusted."
        )
