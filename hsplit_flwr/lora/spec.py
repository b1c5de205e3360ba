"""LoRA as data: what to train (`LoraSpec`) and what was trained (`LoraFactors`). No PEFT, no model.

Terms are PEFT's. A *module name* is always that of the whole model (``model.layers.3.self_attn.q_proj``),
also where a process holds only a segment of it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from hsplit_flwr.errors import ConfigError

ALL_LINEAR = "all-linear"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoraSpec:
    """Which linear layers of a block get an adapter, and of what rank and alpha.

    ``rank_pattern`` and ``alpha_pattern`` work as in PEFT: a key is a regular expression for the end of a module
    name, the first match wins, otherwise ``r`` and ``lora_alpha`` hold. Rank 0 means no adapter there.
    ``target_modules`` is ``"all-linear"`` (every linear layer of a block) or a tuple of module-name endings.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = [self.r, *self.rank_pattern.values()]
        if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in ranks):
            raise ConfigError(f"Expected LoRA ranks to be integers >= 0, found {ranks}. Use 0 for 'no adapter'.")
        alphas = [self.lora_alpha, *self.alpha_pattern.values()]
        if not all(isinstance(alpha, int | float) and 0 < alpha < math.inf for alpha in alphas):
            raise ConfigError(f"Expected every lora_alpha to be a finite number > 0, found {alphas}.")
        for key in [*self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(key)
            except re.error as error:
                raise ConfigError(f"Expected a regular expression in a pattern, found {key!r}: {error}.") from error
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            object.__setattr__(self, "target_modules", (self.target_modules,))
        if not self.target_modules:
            raise ConfigError(f"Expected target_modules, found none. Use {ALL_LINEAR!r}, or r=0 for no adapter.")

    def targets(self, module_names: Iterable[str]) -> list[str]:
        """Those of `module_names` that the spec trains (rank > 0), in the given order.

        Raises:
            ConfigError: a target matches no module.
        """
        names = list(module_names)
        if isinstance(self.target_modules, str):
            chosen = names
        else:
            endings = self.target_modules
            chosen = [n for n in names if any(n == e or n.endswith(f".{e}") for e in endings)]
            missing = [e for e in endings if not any(n == e or n.endswith(f".{e}") for n in names)]
            if missing:
                leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
                raise ConfigError(
                    f"Expected target_modules among the linear layers {leaves}, found {missing}. "
                    f"Use one of those names or {ALL_LINEAR!r}."
                )
        return [n for n in chosen if self.rank(n) > 0]

    def check(self, module_names: Iterable[str]) -> None:
        """Refuse a spec that names what the model does not have.

        Args:
            module_names: every linear layer of the whole model's blocks: a pattern for a late block matches nothing in
                a head, and is right there.

        Raises:
            ConfigError: a target or a pattern matches no module.
        """
        names = list(module_names)
        self.targets(names)
        for field_name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, field_name):
                if not any(_ending(key).fullmatch(name) for name in names):
                    raise ConfigError(
                        f"Expected {field_name} to match a linear layer of the model, found {key!r} that matches none "
                        f"of {len(names)}, such as {names[0]!r}. It is a regular expression for the end of a name."
                    )

    def rank(self, module_name: str) -> int:
        """The rank of the adapter on `module_name` (0: none)."""
        return _first_match(self.rank_pattern, module_name, self.r)

    def scaling(self, module_name: str) -> float:
        """The scaling ``lora_alpha / r`` of the adapter on `module_name`."""
        return _first_match(self.alpha_pattern, module_name, self.lora_alpha) / self.rank(module_name)

    def spelled_out(self, module_names: Iterable[str]) -> "LoraSpec":
        """The same adapters on `module_names` by their whole names, without regular expressions: to be sent.

        A spec without regular expressions stays as it is.
        """
        if all(map(is_literal, [*self.rank_pattern, *self.alpha_pattern])):
            return self
        names = self.targets(module_names)
        alphas = {re.escape(name): _first_match(self.alpha_pattern, name, self.lora_alpha) for name in names}
        return LoraSpec(
            r=0,
            lora_alpha=self.lora_alpha,
            rank_pattern=_by_whole_name({name: self.rank(name) for name in names}),
            alpha_pattern=alphas,
        )

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int], lora_alpha: float) -> "LoraSpec":
        """A rank for every module by its whole name, none elsewhere; one alpha for all.

        So one learning rate suits all ranks: what AdamW's first step on B changes is a sum of r terms of like sign,
        and the scaling alpha / r makes a mean of it.
        """
        return cls(r=0, lora_alpha=lora_alpha, rank_pattern=_by_whole_name(ranks))

    @classmethod
    def of_scaling(cls, ranks: Mapping[str, int], scaling: float) -> "LoraSpec":
        """As `of_ranks`, but with one scaling for all: alpha = `scaling` * rank."""
        trained = _by_whole_name(ranks)
        return cls(r=0, rank_pattern=trained, alpha_pattern={name: scaling * rank for name, rank in trained.items()})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `from_dict` takes it back."""
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": targets,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LoraSpec":
        """The spec that `to_dict` wrote.

        Raises:
            ConfigError: unknown or missing keys.
        """
        expected = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
        if set(data) != expected:
            raise ConfigError(f"Expected a LoRA spec with the keys {sorted(expected)}, found {sorted(data)}.")
        targets = data["target_modules"]
        return cls(**{**data, "target_modules": targets if isinstance(targets, str) else tuple(targets)})


def is_literal(key: str) -> bool:
    """Whether the pattern `key` is a plain text, escaped: it takes no longer to match than the text."""
    return re.escape(re.sub(r"\\(.)", r"\1", key, flags=re.DOTALL)) == key


def _by_whole_name(ranks: Mapping[str, int]) -> dict[str, int]:
    return {re.escape(name): rank for name, rank in ranks.items() if rank > 0}


def _first_match(pattern: Mapping[str, Number], module_name: str, default: Number) -> Number:
    for key, value in pattern.items():
        if _ending(key).fullmatch(module_name):
            return value
    return default


@lru_cache(maxsize=1 << 14)  # a planned client has a key per matrix, more than re's own cache holds
def _ending(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})")
