"""What an audit of a store finds; and that it finds nothing in those that the documents rest on."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.audit import AuditPlan, audit, one_origin
from hsplit_flwr.experiments.evidence.claims import Claim, Finding
from hsplit_flwr.experiments.evidence.paired import Interval, paired_table
from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.evidence.stored_runs import StoredRuns
from hsplit_flwr.experiments.main import main
from hsplit_flwr.experiments.records import Evaluation, RunSpec

EVIDENCE = Path(__file__).resolve().parents[2] / "simulations" / "evidence"
TOML = """
[run]
rounds = 2
[matrix]
methods = ["hsplitlora", "splitlora"]
settings = ["homogeneous"]
partitions = ["iid"]
seeds = [0, 1]
[learning_rates]
hsplitlora = 0.01
splitlora = 0.01
"""
SEARCH = "[audit]\nsearch = 'search.csv'\n"


def evaluations(perplexities: Sequence[float], step_s: float = 10.0) -> list[Evaluation]:
    return [
        replace(Evaluation.untrained(value), round=number, virtual_s=step_s * number)
        for number, value in enumerate(perplexities)
    ]


def spec(method: str, seed: int = 0, rate: float = 0.01, **changes: object) -> RunSpec:
    return replace(RunSpec(method, "homogeneous", "iid", seed, rate, rounds=2), **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two methods, two seeds, as `TOML` asks for; ours ends 1 % lower, in half the time."""
    monkeypatch.setattr("hsplit_flwr.common.provenance.commit", lambda: "a" * 40)
    found = Store(tmp_path / "store.csv")
    for seed in (0, 1):
        found.append(spec("hsplitlora", seed), evaluations((100.0, 8.0, 3.96), 5.0))
        found.append(spec("splitlora", seed), evaluations((100.0, 8.0, 4.0)))
    return found


def audited(store: Store, more: str = "") -> dict[str, Finding]:
    from hsplit_flwr.experiments.experiment_file import read_experiment
    from hsplit_flwr.experiments.methods import METHODS

    path = store.path.with_name("experiment.toml")
    path.write_text(TOML + more)
    wanted = read_experiment(path, METHODS, ["homogeneous"])
    return {finding.what: finding for finding in audit(AuditPlan.read(path), wanted, store)}


def bad(findings: dict[str, Finding]) -> set[str]:
    return {what for what, finding in findings.items() if not finding.fine}


def test_a_store_that_is_as_it_should_be(store: Store) -> None:
    assert bad(audited(store)) == set()


def test_a_run_too_few_a_run_too_many_and_a_run_cut_short(store: Store) -> None:
    store.append(spec("splitlora", 2), evaluations((100.0, 8.0)))
    findings = audited(store)
    assert findings["the runs that the file asks for, and no others"].found == "4 of 4, 1 others"
    assert findings["runs with all of their rounds"].found == "splitlora, seed 2"
    assert len(bad(findings)) == 2
    store.path.write_text("".join(line for line in store.path.open() if ",splitlora,homogeneous,iid,1," not in line))
    assert audited(store)["the runs that the file asks for, and no others"].found.startswith("3 of 4")


@pytest.mark.parametrize(
    ("name", "value"), [("commit", "b" * 40), ("commit", ""), ("dirty", "true"), ("torch", "2.0"), ("command", "other")]
)
def test_rows_of_another_commit_version_or_command(store: Store, name: str, value: str) -> None:
    lines = store.path.read_text().splitlines()
    place = lines[0].split(",").index(name)
    cells = lines[-1].split(",")
    cells[place] = value
    store.path.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    assert [finding.fine for finding in one_origin(store.rows())].count(False) == 1


def searched(store: Store, best: float, rates: Sequence[float], name: str = "search.csv", **changes: object) -> None:
    """A search beside `store`: the rate `best` ends lowest."""
    search = Store(store.path.with_name(name))
    for method in ("hsplitlora", "splitlora"):
        for rate in rates:
            values = (9.0, 5.0, 3.0 if rate == best else 4.0)
            run = spec(method, 10, rate, held_out="validation")
            search.append(replace(run, **changes), evaluations(values))  # type: ignore[arg-type]


def test_rates_of_a_search(store: Store) -> None:
    searched(store, 0.01, (0.005, 0.01, 0.02))
    assert bad(audited(store, SEARCH)) == set()


@pytest.mark.parametrize(
    ("best", "rates", "changes", "what"),
    [
        (0.02, (0.005, 0.01, 0.02, 0.05), {}, "learning rates: the best of the search"),
        (0.01, (0.01, 0.02), {}, "learning rates: none at the edge of the search"),
        (0.01, (0.005, 0.01, 0.02), {"held_out": "test"}, "search: the validation half"),
        (0.01, (0.005, 0.01, 0.02), {"seed": 1}, "search: other seeds"),
    ],
)
def test_rates_that_were_not_found_as_they_should_be(
    store: Store, best: float, rates: Sequence[float], changes: dict[str, object], what: str
) -> None:
    searched(store, best, rates, **changes)  # type: ignore[arg-type]
    assert bad(audited(store, SEARCH)) == {what}


def test_a_rate_that_was_searched_for_another_method(store: Store) -> None:
    searched(store, 0.01, (0.005, 0.01, 0.02))
    other = store.path.with_name("search.csv")
    other.write_text("".join(line for line in other.open() if ",splitlora," not in line))
    assert bad(audited(store, SEARCH)) == {"learning rates: the best of the search"}
    assert bad(audited(store, f"{SEARCH}[audit.rates_of]\nsplitlora = 'hsplitlora'\n")) == set()


def test_a_search_may_go_on_in_another_store(store: Store) -> None:
    """The best rate was an edge; searching all over again would have cost as much once more."""
    searched(store, 0.01, (0.005, 0.01))
    assert bad(audited(store, SEARCH)) == {"learning rates: none at the edge of the search"}
    both = "[audit]\nsearch = ['search.csv', 'more.csv']\n"
    searched(store, 0.01, (0.02,), "more.csv")
    assert bad(audited(store, both)) == set()
    searched(store, 0.01, (0.05,), "more.csv", rounds=1)
    assert bad(audited(store, both)) >= {"searches of like runs"}


CLAIM = "[[claims]]\nours = 'hsplitlora'\nrival = 'splitlora'\n"


@pytest.mark.parametrize(
    ("claim", "found", "fine"),
    [
        ("speed_up = 1.9", "2.01 x (2.01 - 2.01)", True),  # 4.0 is crossed a little before the end
        ("speed_up = 2.1", "2.01 x (2.01 - 2.01)", False),
        ("perplexity_within = 1.5", "-1.00 % (-1.00 - -1.00)", True),
        ("perplexity_within = 0.5", "-1.00 % (-1.00 - -1.00)", False),
    ],
)
def test_claims_are_computed_again(store: Store, claim: str, found: str, fine: bool) -> None:
    finding = list(audited(store, CLAIM + claim).values())[-1]
    assert (finding.found, finding.fine) == (found, fine)
    assert finding.what.endswith(": homogeneous, iid")


def test_a_claim_whose_runs_are_not_there_does_not_hold(store: Store) -> None:
    for claim in ("settings = ['small_server']\nspeed_up = 1.0", "speed_up = 1.0"):
        text = (CLAIM + claim).replace("'splitlora'", "'hetlora'")
        assert not list(audited(store, text).values())[-1].fine


def test_a_claim_that_ours_never_gets_to_does_not_hold(store: Store) -> None:
    runs = StoredRuns.of(store.rows())
    (finding,) = Claim("splitlora", "hsplitlora", "speed_up", 0.1).findings(runs)
    assert (finding.found, finding.fine) == ("in 0 of 2 seeds it gets there", False)


@pytest.mark.parametrize("wrong", ["", "speed_up = 1.0\nperplexity_within = 1.0", "speedup = 2.0"])
def test_a_claim_is_one_figure(store: Store, wrong: str) -> None:
    with pytest.raises(ConfigError, match="speed_up, perplexity_within"):
        audited(store, CLAIM + wrong)


def test_an_unknown_key_of_the_audit(store: Store) -> None:
    with pytest.raises(ConfigError, match="serach"):
        audited(store, "[audit]\nserach = 'x.csv'\n")


def test_an_interval_is_students() -> None:
    values = (1.0, 2.0, 4.5)
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    found = Interval.of(values)
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert Interval.of([1.0]).half_width == math.inf


def test_paired_differences_say_when_there_is_none(store: Store) -> None:
    text = paired_table(StoredRuns.of(store.rows()), "hsplitlora", ["splitlora", "hetlora"])
    assert "-1.0 +- 0.0 %, n = 2" in text
    assert "none" not in text
    store.append(spec("splitlora", 2), evaluations((100.0, 8.0, 3.9)))
    store.append(spec("hsplitlora", 2), evaluations((100.0, 8.0, 4.1)))
    assert "%, n = 3: none" in paired_table(StoredRuns.of(store.rows()), "hsplitlora", ["splitlora"])


@pytest.mark.parametrize("store", sorted(EVIDENCE.glob("*.csv")), ids=lambda path: path.stem)
def test_the_stored_evidence(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["audit", str(store.with_suffix(".toml")), "--store", str(store)])
    assert code == 0, capsys.readouterr().out
