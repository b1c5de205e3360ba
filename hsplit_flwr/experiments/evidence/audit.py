"""Would a store of results survive a reviewer? What is checked of it, beside what it claims (`claims.py`).

Every run that the experiment asks for is there whole and no other, all of one clean commit and one set of versions.
Learning rates are the best ones of a search that the file names: on the validation half, of other seeds, not at the
edge of what was tried.

    [audit]
    search = "search_exchange.csv"      # beside the file; or a list: a later search goes on where the best was an edge
    [audit.rates_of]                    # whose rate a method takes that was not searched itself
    hsplitlora_int8 = "hsplitlora"
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hsplit_flwr.common.tables import format_table
from hsplit_flwr.common.toml_file import read_toml
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.claims import Claim, Finding
from hsplit_flwr.experiments.evidence.store import Store, StoredEvaluation, key_of
from hsplit_flwr.experiments.evidence.stored_runs import StoredRun, StoredRuns
from hsplit_flwr.experiments.evidence.summary import best_learning_rates
from hsplit_flwr.experiments.records import RunSpec

SHOWN = 3
"""of what is wrong, so many are named"""


@dataclass(frozen=True)
class AuditPlan:
    """What an experiment file says of how its store is to be looked at."""

    searches: tuple[Path, ...] = ()
    rates_of: Mapping[str, str] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "AuditPlan":
        """From the tables ``[audit]`` and ``[[claims]]`` of the file at `path`.

        Raises:
            ConfigError: no such file, not TOML, or a key that is none.
        """
        content = read_toml(path, "an experiment")
        audit: Mapping[str, Any] = content.get("audit", {})
        if unknown := set(audit) - {"search", "rates_of"}:
            raise ConfigError(f"{path}: expected search and rates_of in [audit], found {', '.join(sorted(unknown))}.")
        names = audit.get("search", [])
        searches = tuple(path.parent / name for name in ([names] if isinstance(names, str) else names))
        return cls(searches, audit.get("rates_of", {}), tuple(Claim.read(table) for table in content.get("claims", ())))


def audit(plan: AuditPlan, wanted: Sequence[RunSpec], store: Store, order: Sequence[str] = ()) -> list[Finding]:
    """Everything that was looked at in `store`, which is to hold the runs `wanted` and no others.

    Raises:
        ConfigError: the store, or that of the search, is none.
    """
    rows = store.rows()
    runs = StoredRuns.of(rows, order)
    found = [_complete(wanted, runs.runs), _whole(runs.runs), *one_origin(rows)]
    if plan.searches:
        found += _searched(plan, wanted, [Store(path).rows() for path in plan.searches])
    return found + [finding for claim in plan.claims for finding in claim.findings(runs)]


def audit_table(findings: Sequence[Finding], *, markdown: bool = False) -> str:
    """A line per finding."""
    rows = [[finding.what, finding.found, "yes" if finding.fine else "NO"] for finding in findings]
    return format_table(["what", "found", "holds"], rows, markdown, left_aligned=2)


def one_origin(rows: Sequence[StoredEvaluation]) -> list[Finding]:
    """All rows of one clean commit, of one set of versions, made by one command."""
    commits = Counter(row.origin.commit[:10] + ("+changes" if row.origin.dirty else "") for row in rows)
    versions = Counter(", ".join(f"{name} {number}" for name, number in row.origin.versions.items()) for row in rows)
    commands = Counter(row.origin.command for row in rows)
    clean = len(commits) == 1 and not rows[0].origin.dirty and rows[0].origin.commit != ""
    return [
        Finding("one clean commit", _counted(commits), clean),
        Finding("one set of versions", _counted(versions), len(versions) == 1),
        Finding("one command", _counted(commands), len(commands) == 1),
    ]


def _counted(counts: Counter[str]) -> str:
    """What rows have; how many have each, where they differ."""
    if len(counts) == 1:
        return _some(counts)
    return _some(f"{count} rows: {item or 'nothing'}" for item, count in counts.items())


def _complete(wanted: Sequence[RunSpec], runs: Sequence[StoredRun]) -> Finding:
    asked, there = {key_of(spec) for spec in wanted}, {run.spec.key for run in runs}
    text = f"{len(asked & there)} of {len(asked)}" + (f", {len(there - asked)} others" if there - asked else "")
    return Finding("the runs that the file asks for, and no others", text, asked == there)


def _whole(runs: Sequence[StoredRun]) -> Finding:
    """A run has each of its rounds once, and the one before training."""
    broken = [
        f"{run.spec.method}, seed {run.spec.seed}"
        for run in runs
        if [evaluation.round for evaluation in run.evaluations] != list(range(run.spec.rounds + 1))
    ]
    return Finding("runs with all of their rounds", _some(broken) if broken else "all", not broken)


def _searched(
    plan: AuditPlan, wanted: Sequence[RunSpec], searches: Sequence[Sequence[StoredEvaluation]]
) -> list[Finding]:
    runs = StoredRuns.of([row for rows in searches for row in rows])
    halves, seeds = {run.spec.held_out for run in runs.runs}, {run.spec.seed for run in runs.runs}
    shared = seeds & {spec.seed for spec in wanted}
    best = best_learning_rates(runs)
    other, edge = [], []
    for method, rate in sorted({(spec.method, spec.learning_rate) for spec in wanted}):
        searched = plan.rates_of.get(method, method)
        tried = sorted({run.spec.learning_rate for run in runs.runs if run.spec.method == searched})
        if not tried or best[searched] != rate:
            other.append(f"{method} {rate:g} instead of {best.get(searched, 'a searched one')}")
        elif rate in (tried[0], tried[-1]):
            edge.append(f"{method} {rate:g}")
    return [
        Finding("search: the validation half", _some(halves), halves == {"validation"}),
        Finding("search: other seeds", _some(seeds), not shared),
        *(
            Finding(f"search, {finding.what}", finding.found, finding.fine)
            for rows in searches
            for finding in one_origin(rows)
        ),
        *_alike(searches),
        Finding("learning rates: the best of the search", _some(other) if other else "all", not other),
        Finding("learning rates: none at the edge of the search", _some(edge) if edge else "all", not edge),
    ]


def _alike(searches: Sequence[Sequence[StoredEvaluation]]) -> list[Finding]:
    """Runs of several searches differ in method and rate alone: else their perplexities are not comparable."""
    if len(searches) == 1:
        return []
    kinds = [{replace(row.spec, method="any", learning_rate=1.0) for row in rows} for rows in searches]
    same = all(kind == kinds[0] for kind in kinds)
    return [Finding("searches of like runs", f"{len(searches)} stores" + ("" if same else ", unlike"), same)]


def _some(items: Iterable[object]) -> str:
    """The first of them, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more
