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
from hsplit_flwr.lora.module_choice import ALL_LINEAR, Names, in_blocks, is_regex, matching, normalized

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoraSpec:
    """Which linear layers of a block get an adapter, and of what rank and alpha.

    ``rank_pattern`` and ``alpha_pattern`` work as in PEFT: a key is a regular expression for the end of a module
    name, the first match wins, otherwise ``r`` and ``lora_alpha`` hold. Rank 0 means no adapter there.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: Names = ALL_LINEAR
    """``"all-linear"`` (every linear layer of a block that takes an adapter), endings, or a regular expression"""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Names = ()
    """endings or a regular expression for what gets none"""
    layers_to_transform: tuple[int, ...] | None = None
    """the blocks whose layers get one; None: all"""
    use_rslora: bool = False
    """rank-stabilized scaling, ``lora_alpha / sqrt(r)`` (arXiv:2312.03732)"""

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
        for key in ("target_modules", "exclude_modules"):
            object.__setattr__(self, key, normalized(key, getattr(self, key)))
        if not self.target_modules:
            raise ConfigError(f"Expected target_modules, found none. Use {ALL_LINEAR!r}, or r=0 for no adapter.")

    def targets(self, module_names: Iterable[str]) -> list[str]:
        """Those of `module_names` that the spec trains (rank > 0), in the given order.

        Raises:
            ConfigError: a target, or what is to be left out, matches no module; or a block has none.
        """
        names = list(module_names)
        chosen = matching("target_modules", self.target_modules, names)
        if self.exclude_modules:
            excluded = set(matching("exclude_modules", self.exclude_modules, names))
            chosen = [name for name in chosen if name not in excluded]
        if self.layers_to_transform is not None:
            chosen = in_blocks(self.layers_to_transform, chosen)
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
        """The scaling of the adapter on `module_name`: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)``."""
        rank = self.rank(module_name)
        return _first_match(self.alpha_pattern, module_name, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)

    def spelled_out(self, module_names: Iterable[str], whole: Iterable[str] | None = None) -> "LoraSpec":
        """The same adapters on `module_names` by their whole names, without regular expressions: to be sent.

        A spec that says no more than ranks and endings, all of which are there, stays as it is.

        Args:
            module_names: the linear layers of a head.
            whole: those of the whole model, among which the spec chooses; default: `module_names`. A head need not
                have a layer of each kind.
        """
        here = list(module_names)
        names = set(self.targets(here if whole is None else whole))
        if self._is_plain() and (whole is None or self._all_are_in(here)):
            return self
        held = [name for name in here if name in names]
        alphas = {re.escape(name): self._alpha(name) for name in held}
        return LoraSpec(
            r=0,
            lora_alpha=self.lora_alpha,
            rank_pattern=_by_whole_name({name: self.rank(name) for name in held}),
            alpha_pattern=alphas,
        )

    def _is_plain(self) -> bool:
        """Whether ranks, alphas and endings say all, and none of them is a regular expression."""
        further = self.exclude_modules or self.layers_to_transform is not None or self.use_rslora
        patterns = all(map(is_literal, [*self.rank_pattern, *self.alpha_pattern]))
        return patterns and not further and not is_regex(self.target_modules)

    def _all_are_in(self, names: list[str]) -> bool:
        try:
            matching("target_modules", self.target_modules, names)
        except ConfigError:
            return False
        return True

    def _alpha(self, module_name: str) -> float:
        """What divided by the rank is the scaling."""
        if self.use_rslora:
            return self.scaling(module_name) * self.rank(module_name)
        return _first_match(self.alpha_pattern, module_name, self.lora_alpha)

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int], lora_alpha: float, *, use_rslora: bool = False) -> "LoraSpec":
        """A rank for every module by its whole name, none elsewhere; one alpha for all.

        So one learning rate suits all ranks: what AdamW's first step on B changes is a sum of r terms of like sign,
        and the scaling alpha / r makes a mean of it. With `use_rslora` it is alpha / sqrt(r), said without the word,
        so that the spec can be sent.
        """
        trained = _by_whole_name(ranks)
        alphas = {name: lora_alpha * rank**0.5 for name, rank in trained.items()} if use_rslora else {}
        return cls(r=0, lora_alpha=lora_alpha, rank_pattern=trained, alpha_pattern=alphas)

    @classmethod
    def of_scaling(cls, ranks: Mapping[str, int], scaling: float) -> "LoraSpec":
        """As `of_ranks`, but with one scaling for all: alpha = `scaling` * rank."""
        trained = _by_whole_name(ranks)
        return cls(r=0, rank_pattern=trained, alpha_pattern={name: scaling * rank for name, rank in trained.items()})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form of a spec that is `spelled_out`; `from_dict` takes it back.

        Raises:
            ConfigError: it is not.
        """
        if self.exclude_modules or self.layers_to_transform is not None or self.use_rslora:
            raise ConfigError(f"Expected a spec of ranks and names to be sent, found {self}. Send spelled_out(...).")
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
            ConfigError: unknown or missing keys, or a regular expression, which may take any time to match.
        """
        expected = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
        if set(data) != expected:
            raise ConfigError(f"Expected a LoRA spec with the keys {sorted(expected)}, found {sorted(data)}.")
        targets = data["target_modules"]
        if is_regex(targets):
            raise ConfigError(f"Expected target_modules of plain names, found {targets!r}. Send spelled_out(...).")
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
