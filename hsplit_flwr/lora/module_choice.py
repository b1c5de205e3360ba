"""Which linear layers a LoRA spec is for, by PEFT's ways of saying it.

A tuple names endings of module names (``q_proj``, ``1.mlp.up_proj``), a text with a regular expression the whole name,
as ``re.fullmatch`` finds it. A plain text is one ending.
"""

import re
from collections.abc import Iterable, Sequence

from hsplit_flwr.errors import ConfigError

ALL_LINEAR = "all-linear"
_PLAIN = re.compile(r"[\w.-]+")
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
Names = str | tuple[str, ...]


def is_regex(names: Names) -> bool:
    """Whether `names` is a regular expression for whole names."""
    return isinstance(names, str) and names != ALL_LINEAR and not _PLAIN.fullmatch(names)


def normalized(key: str, names: Names) -> Names:
    """`names` as they are kept: a plain text as a tuple of one.

    Raises:
        ConfigError: an expression that does not compile; `key` is what people typed it for.
    """
    if is_regex(names):
        assert isinstance(names, str)
        try:
            re.compile(names)
        except re.error as error:
            raise ConfigError(f"Expected a regular expression in {key}, found {names!r}: {error}.") from error
        return names
    return (names,) if isinstance(names, str) and names != ALL_LINEAR else names


def from_words(words: Sequence[str]) -> Names:
    """What people typed, word by word: endings, or one regular expression; none: every linear layer."""
    if not words:
        return ALL_LINEAR
    return words[0] if len(words) == 1 and is_regex(words[0]) else tuple(words)


def matching(key: str, names: Names, module_names: Sequence[str]) -> list[str]:
    """Those of `module_names` that `names` means, in the given order.

    Raises:
        ConfigError: an ending, or the expression, matches none of them.
    """
    if names == ALL_LINEAR:
        return list(module_names)
    if isinstance(names, str):
        found = [name for name in module_names if re.fullmatch(names, name)]
        missing = [] if found else [names]
    else:
        found = [name for name in module_names if any(_ends(name, ending) for ending in names)]
        missing = [ending for ending in names if not any(_ends(name, ending) for name in module_names)]
    if missing:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in module_names})
        raise ConfigError(
            f"Expected {key} among the linear layers {leaves}, found {missing}. "
            f"Use one of those names or {ALL_LINEAR!r}, or a regular expression for whole names such as "
            f"{'.*' + re.escape(module_names[0][-12:]) if module_names else '.*'!r}."
        )
    return found


def in_blocks(blocks: Iterable[int], module_names: Sequence[str]) -> list[str]:
    """Those of `module_names` that lie in one of `blocks`.

    Raises:
        ConfigError: a block without a linear layer.
    """
    wanted = set(blocks)
    block_of = {name: int(found[1]) for name in module_names if (found := _BLOCK.search(name))}
    if missing := sorted(wanted - set(block_of.values())):
        raise ConfigError(
            f"Expected layers_to_transform among the blocks 0..{max(block_of.values(), default=-1)}, found {missing}."
        )
    return [name for name in module_names if block_of.get(name) in wanted]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
