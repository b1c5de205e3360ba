"""The rows of a store as runs, grouped for comparison.

A *scenario* is all that two methods must share to be compared: setting, partition, model, data, rounds and so on.
A *variant* is a method with its learning rate, cut and rank. Runs of one scenario and variant differ by their seed.
Labels name what varies: the runs of a sweep over cuts are ``splitlora, cut 1``, ``splitlora, cut 2`` and so on.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hsplit_flwr.experiments.evidence.store import StoredEvaluation
from hsplit_flwr.experiments.records import Evaluation, RunSpec

VARIANT_FIELDS = ("learning_rate", "cut", "rank")
SCENARIO_FIELDS = tuple(name for name in RunSpec.field_names() if name not in (*VARIANT_FIELDS, "method", "seed"))
_SHORT = {"learning_rate": "lr"}


@dataclass(frozen=True)
class StoredRun:
    """A run with its evaluations in the order of their rounds."""

    spec: RunSpec
    evaluations: tuple[Evaluation, ...]

    @property
    def final_perplexity(self) -> float:
        """After the last round; infinite if it is not a number."""
        perplexity = self.evaluations[-1].perplexity
        return math.inf if math.isnan(perplexity) else perplexity

    def seconds_to(self, perplexity: float) -> float | None:
        """Virtual time at which the run first reaches `perplexity`; None if it never does.

        Between evaluations the logarithm of the perplexity, which is the loss, is taken to fall linearly.
        """
        before: Evaluation | None = None
        for now in self.evaluations:
            if now.perplexity <= perplexity:
                if before is None or not math.isfinite(before.perplexity):
                    return now.virtual_s
                whole = math.log(before.perplexity / now.perplexity)
                share = math.log(before.perplexity / perplexity) / whole
                return before.virtual_s + share * (now.virtual_s - before.virtual_s)
            before = now
        return None


@dataclass(frozen=True)
class StoredRuns:
    """All runs of a store, sorted by scenario, method and seed.

    Args:
        runs: in any order.
        order: names of methods, settings and partitions in the order to show them; others follow by alphabet.
    """

    runs: tuple[StoredRun, ...]
    order: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[StoredEvaluation], order: Collection[str] = ()) -> "StoredRuns":
        """The runs that the rows of a store belong to."""
        by_spec: dict[RunSpec, list[Evaluation]] = {}
        for row in rows:
            by_spec.setdefault(row.spec, []).append(row.evaluation)
        runs = [StoredRun(spec, tuple(sorted(found, key=lambda e: e.round))) for spec, found in by_spec.items()]
        places = {name: place for place, name in enumerate(order)}

        def place(run: StoredRun) -> tuple[Any, ...]:
            spec = run.spec
            named = [(places.get(name, len(places)), name) for name in (spec.setting, spec.partition, spec.method)]
            return *named[:2], scenario_of(run), named[2], variant_of(run), spec.seed

        return cls(tuple(sorted(runs, key=place)), tuple(order))

    def scenarios(self) -> dict[str, list[StoredRun]]:
        """Label -> its runs."""
        return self._grouped(self.runs, self.scenario)

    def variants(self, runs: Iterable[StoredRun] | None = None) -> dict[str, list[StoredRun]]:
        """Label -> its runs, of `runs` or of all."""
        return self._grouped(self.runs if runs is None else runs, self.variant)

    def scenario(self, run: StoredRun) -> str:
        """``heterogeneous, iid``, and whatever else varies over the store."""
        more = [name for name in SCENARIO_FIELDS[2:] if len(self._values[name]) > 1]
        return ", ".join([run.spec.setting, run.spec.partition, *(_named(run, name) for name in more)])

    def variant(self, run: StoredRun) -> str:
        """The method, and what varies over the runs of that method."""
        varying = self._varying[run.spec.method]
        return ", ".join([run.spec.method, *(_named(run, name) for name in varying)])

    @cached_property
    def _values(self) -> Mapping[str, set[Any]]:
        return {name: {getattr(run.spec, name) for run in self.runs} for name in SCENARIO_FIELDS}

    @cached_property
    def _varying(self) -> Mapping[str, list[str]]:
        by_method = self._grouped(self.runs, lambda run: run.spec.method)
        return {
            method: [name for name in VARIANT_FIELDS if len({getattr(run.spec, name) for run in runs}) > 1]
            for method, runs in by_method.items()
        }

    @staticmethod
    def _grouped(runs: Iterable[StoredRun], label: Any) -> dict[str, list[StoredRun]]:
        groups: dict[str, list[StoredRun]] = {}
        for run in runs:
            groups.setdefault(label(run), []).append(run)
        return groups


def scenario_of(run: StoredRun) -> tuple[Any, ...]:
    """The values of `SCENARIO_FIELDS`."""
    return tuple(getattr(run.spec, name) for name in SCENARIO_FIELDS)


def variant_of(run: StoredRun) -> tuple[Any, ...]:
    """The values of `VARIANT_FIELDS`."""
    return tuple(getattr(run.spec, name) for name in VARIANT_FIELDS)


def by_seed(runs: Sequence[StoredRun]) -> dict[int, list[StoredRun]]:
    """Seed -> its runs."""
    seeds: dict[int, list[StoredRun]] = {}
    for run in runs:
        seeds.setdefault(run.spec.seed, []).append(run)
    return seeds


def _named(run: StoredRun, name: str) -> str:
    value = getattr(run.spec, name)
    return f"{_SHORT.get(name, name)} {value:g}" if isinstance(value, float) else f"{_SHORT.get(name, name)} {value}"
