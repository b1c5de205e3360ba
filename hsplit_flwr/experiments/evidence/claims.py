"""Claims that an experiment file makes of its runs, computed again from the store.

    [[claims]]
    ours = "hsplitlora_pipelined"
    rival = "splitlora_16"
    speed_up = 1.7              # at least so many times sooner where the rival ends

    [[claims]]
    ours = "hsplitlora_int8"
    rival = "hsplitlora_fp32"
    perplexity_within = 1.0     # at most so many percent above or below

Both are means over seeds, and must hold in every scenario of the store, or in those that `settings` lists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.paired import perplexity_changes
from hsplit_flwr.experiments.evidence.stored_runs import StoredRun, StoredRuns
from hsplit_flwr.experiments.evidence.summary import mean, seeds, speed_ups

FIGURES = ("speed_up", "perplexity_within")
KEYS = ("ours", "rival", "settings", *FIGURES)


@dataclass(frozen=True)
class Finding:
    """Something an audit looked at."""

    what: str
    found: str
    fine: bool


@dataclass(frozen=True)
class Claim:
    """What is claimed of two methods."""

    ours: str
    rival: str
    figure: str
    """one of `FIGURES`"""
    bound: float
    settings: tuple[str, ...] = ()
    """empty: all"""

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> "Claim":
        """The claim of a table of the file.

        Raises:
            ConfigError: a key that is none, or not exactly one figure.
        """
        unknown, figures = set(table) - set(KEYS), [name for name in FIGURES if name in table]
        if unknown or len(figures) != 1 or not {"ours", "rival"} <= set(table):
            raise ConfigError(
                f"Expected [[claims]] with ours, rival and one of {', '.join(FIGURES)}, found {', '.join(table)}."
            )
        name = figures[0]
        return cls(table["ours"], table["rival"], name, float(table[name]), tuple(table.get("settings", ())))

    def findings(self, runs: StoredRuns) -> list[Finding]:
        """Whether it holds, scenario by scenario; at least one."""
        compare = {"speed_up": self._speed_up, "perplexity_within": self._within}[self.figure]
        found = []
        for label, of_scenario in runs.scenarios().items():
            if not self.settings or of_scenario[0].spec.setting in self.settings:
                mine, theirs = (
                    [run for run in of_scenario if run.spec.method == name] for name in (self.ours, self.rival)
                )
                text, fine = compare(mine, theirs)
                found.append(Finding(f"{self}: {label}", text, fine))
        return found or [Finding(str(self), "no runs", False)]

    def __str__(self) -> str:
        wanted = f">= {self.bound:g} x sooner" if self.figure == "speed_up" else f"within {self.bound:g} %"
        return f"{self.ours} against {self.rival}, {wanted}"

    def _speed_up(self, mine: Sequence[StoredRun], theirs: Sequence[StoredRun]) -> tuple[str, bool]:
        figures = speed_ups(mine, {run.spec.seed: run for run in theirs})
        reached = [figure for figure in figures if figure is not None]
        if not reached or len(reached) < seeds(theirs):
            return f"in {len(reached)} of {seeds(theirs)} seeds it gets there", False
        return f"{mean(reached):.2f} x ({min(reached):.2f} - {max(reached):.2f})", mean(reached) >= self.bound

    def _within(self, mine: Sequence[StoredRun], theirs: Sequence[StoredRun]) -> tuple[str, bool]:
        changes = perplexity_changes(mine, theirs)
        if not changes or len(changes) < seeds(theirs):
            return f"{len(changes)} of {seeds(theirs)} seeds to compare", False
        shown = f"{mean(changes):+.2f} % ({min(changes):+.2f} - {max(changes):+.2f})"
        return shown, abs(mean(changes)) <= self.bound
