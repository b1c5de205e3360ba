import csv
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from hsplit_flwr.common import provenance
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence import store as store_module
from hsplit_flwr.experiments.evidence.store import COLUMNS, Store, key_of, stored_spec
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.reports.text_intervals import TextIntervals
from hsplit_flwr.reports.text_metrics import TextScores

SPEC = RunSpec("ours", "alike", "iid", 0, 0.1 + 0.2, data="/machine/folder/e2e")
ROOT = Path(__file__).parents[2]
SCORES = ("bleu", "nist", "meteor", "rouge_l", "cider")
INTERVALS = TextIntervals(TextScores(55.5, 7.0, 0.3, 0.5, 1.5), TextScores(66.5, 7.5, 0.45, 0.65, 2.25))


def evaluations(rounds: int = 2) -> list[Evaluation]:
    return [
        Evaluation(
            round=number,
            perplexity=800 / 3**number,
            train_loss=None if number == 0 else math.pi,
            tokens=10**12 + number,
            virtual_s=0.1 * number,
            idle_share=1 / 3,
            bytes_up=number,
            bytes_down=2 * number,
            clients=5,
            too_large=1,
            wall_s=1e-7,
            scores=TextScores(61.5, 7.25, 0.4, 0.6, 2.0) if number == rounds else None,
        )
        for number in range(rounds + 1)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "new" / "results.csv")


def test_what_goes_in_comes_out(store: Store) -> None:
    assert store.append(SPEC, evaluations())
    rows = store.rows()
    assert [row.evaluation for row in rows] == evaluations()  # every digit of every float
    assert {row.spec for row in rows} == {replace(SPEC, data="e2e")}
    assert store.done_keys() == {key_of(SPEC)}


def test_intervals_of_text_scores_come_out_too(store: Store) -> None:
    last = replace(evaluations()[-1], intervals=INTERVALS)
    store.append(SPEC, [*evaluations()[:-1], last])
    assert [row.evaluation.intervals for row in store.rows()] == [None, None, INTERVALS]


def test_a_store_that_was_begun_without_intervals_goes_on(store: Store) -> None:
    store.append(SPEC, evaluations())
    lines = list(csv.reader(store.path.read_text().splitlines()))
    assert lines[0][-10:] == [f"{name}_{end}" for end in ("low", "high") for name in SCORES]
    store.path.write_text("".join(",".join(cells[:-10]) + "\n" for cells in lines))
    before = store.path.read_bytes()
    assert [row.evaluation for row in store.rows()] == evaluations()
    assert not store.append(SPEC, evaluations())
    assert store.path.read_bytes() == before  # nothing is written where nothing is new
    assert store.append(replace(SPEC, seed=1), [replace(evaluations()[-1], intervals=INTERVALS)])
    assert [row.evaluation.intervals for row in store.rows()] == [None, None, None, INTERVALS]
    assert [row.evaluation for row in store.rows()][:3] == evaluations()


def test_columns_are_tidy_and_typed(store: Store) -> None:
    store.append(SPEC, evaluations())
    with store.path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3
    assert lines[2]["bleu"] == "61.5"
    assert lines[0]["bleu"] == lines[0]["train_loss"] == ""
    assert lines[0]["round"] == "0"
    assert {line["key"] for line in lines} == {key_of(SPEC)}
    expected = [*RunSpec.field_names(), *Evaluation.field_names(), *SCORES, "key"]
    expected += [f"{name}_{end}" for name in SCORES for end in ("low", "high")]
    expected += ["commit", "dirty", "python", "torch", "transformers", "peft", "hsplit_flwr", "command"]
    assert set(lines[0]) == set(expected) - {"scores", "intervals"}


def test_rows_say_what_made_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "abc+changes")
    monkeypatch.setattr(provenance, "command", lambda: 'python -m x "quoted, with comma"')
    store.append(SPEC, evaluations())
    origin = store.rows()[0].origin
    assert (origin.commit, origin.dirty, origin.command) == ("abc", True, 'python -m x "quoted, with comma"')
    assert origin.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.match(r"\d+\.\d+", origin.versions["torch"])


def test_the_commit_is_that_of_the_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "commit", lambda: "first")
    store.prepare()
    monkeypatch.setattr(provenance, "commit", lambda: None)
    store.append(SPEC, evaluations())
    assert {(row.origin.commit, row.origin.dirty) for row in store.rows()} == {("first", False)}


def test_no_path_of_the_machine_is_stored_and_keys_do_not_depend_on_it(store: Store) -> None:
    store.append(replace(SPEC, model="/machine/folder/model"), evaluations())
    assert "/machine" not in store.path.read_text()
    elsewhere = replace(SPEC, data="/other/place/e2e")
    assert elsewhere.key != SPEC.key
    assert key_of(elsewhere) == key_of(SPEC) == stored_spec(SPEC).key
    assert stored_spec(replace(SPEC, model="organisation/model")).model == "organisation/model"
    assert key_of(replace(SPEC, data="")) == replace(SPEC, data="").key


def test_a_run_is_stored_once(store: Store) -> None:
    assert store.append(SPEC, evaluations())
    before = store.path.read_bytes()
    assert not store.append(replace(SPEC, data="/elsewhere/e2e"), evaluations(1))
    assert store.path.read_bytes() == before
    assert store.append(replace(SPEC, seed=1), evaluations(1))
    assert store.path.read_bytes().startswith(before)
    assert len(store.rows()) == 3 + 2


def test_numbers_of_numpy_and_infinite_ones_are_numbers(store: Store) -> None:
    odd = replace(evaluations()[1], perplexity=np.float64(1.5), tokens=np.int64(7), train_loss=math.inf)  # type: ignore[arg-type]
    store.append(SPEC, [odd, replace(odd, perplexity=math.nan)])
    first, second = (row.evaluation for row in store.rows())
    assert (first.perplexity, first.tokens, first.train_loss) == (1.5, 7, math.inf)
    assert math.isnan(second.perplexity)


def test_a_store_without_a_file_has_no_runs_and_creates_none(store: Store) -> None:
    assert store.done_keys() == frozenset()
    assert not store.path.parent.exists()
    with pytest.raises(ConfigError, match=r"Expected a results store at .*results\.csv, found: .*No such file"):
        store.rows()
    store.prepare()
    assert store.rows() == []


def test_a_run_without_evaluations_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="Expected at least one evaluation of ours, found none"):
        store.append(SPEC, [])


def edited(store: Store, old: str, new: str) -> Store:
    store.append(SPEC, evaluations())
    text = store.path.read_text()
    assert old in text
    store.path.write_text(text.replace(old, new, 1))
    return store


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ",learning_rate,",
            ",rate,",
            r"columns of this version in .*, found \d+ columns that differ in learning_rate, rate",
        ),
        ("key,method", "method,key", r"differ in their order"),
        (",iid,", ",iid,0,", r"Expected \d+ cells in row 2 of .*results\.csv, found \d+.*Restore"),
        (",iid,", ",random,", r"row 2 of .*: Expected partition .* found 'random'"),
        (",alike,", ",unlike,", r"Expected key \w{12} in row 2 of .*, by its values, found \w{12}.*Restore"),
        (",800.0,", ",8oo,", r"Expected float as perplexity in row 2 of .*, found '8oo'"),
        (",1000000000001,", ",1.5,", r"Expected int as tokens in row 3 of .*, found '1\.5'"),
        (",iid,", ',"iid,', r"Expected a CSV at .*results\.csv, found: .*Restore"),
    ],
)
def test_a_broken_file_is_refused_and_left_alone(store: Store, old: str, new: str, message: str) -> None:
    broken = edited(store, old, new)
    before = broken.path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        broken.rows()
    assert broken.path.read_bytes() == before


def test_nothing_is_appended_to_what_is_no_store(store: Store) -> None:
    store.path.parent.mkdir()
    store.path.write_text("a,b\n1,2\n")
    for touch in (store.prepare, store.done_keys, lambda: store.append(SPEC, evaluations())):
        with pytest.raises(ConfigError, match=r"found 2 columns that differ in .*Use another file"):
            touch()
    assert store.path.read_text() == "a,b\n1,2\n"


def test_a_missing_last_newline_is_mended(store: Store) -> None:
    store.append(SPEC, evaluations())
    store.path.write_text(store.path.read_text().rstrip("\n"))
    store.append(replace(SPEC, seed=1), evaluations())
    assert len(store.rows()) == 6


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Expected a results store that can be written at .* found: "):
        Store(tmp_path / "file" / "results.csv").prepare()


def test_a_lock_that_stays_held_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    store.prepare()
    with (
        FileLock(store.path.with_name(".results.csv.lock")),
        pytest.raises(ConfigError, match=r"Expected the lock of .* found it held\. End the process"),
    ):
        store.append(SPEC, evaluations())


def test_an_interruption_in_the_middle_of_writing_leaves_the_old_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append(SPEC, evaluations())
    before = store.path.read_bytes()

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.append(replace(SPEC, seed=1), evaluations())
    assert store.path.read_bytes() == before
    monkeypatch.undo()
    assert store.append(replace(SPEC, seed=1), evaluations(1))  # the lock is free, what was half written is gone
    assert len(store.rows()) == 3 + 2
    assert sorted(path.name for path in store.path.parent.iterdir()) in (
        [".results.csv.lock", "results.csv"],
        ["results.csv"],
    )


APPEND_MANY = """
import sys
from dataclasses import replace
from test_store import SPEC, evaluations
from hsplit_flwr.experiments.evidence.store import Store
store = Store(sys.argv[1])
for seed in range(int(sys.argv[2]), int(sys.argv[3])):
    store.append(replace(SPEC, seed=seed), evaluations())
"""


def test_processes_that_append_at_once_lose_nothing(store: Store) -> None:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'experiments'}", "PATH": ""}
    ranges = [("0", "12"), ("8", "20"), ("8", "20")]  # overlapping
    processes = [
        subprocess.Popen([sys.executable, "-c", APPEND_MANY, str(store.path), *limits], env=environment)
        for limits in ranges
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    rows = store.rows()
    assert len(rows) == 20 * 3
    found = [(row.spec.seed, row.evaluation.round) for row in rows]
    assert sorted(found) == [(seed, number) for seed in range(20) for number in range(3)]
    assert all(found[place : place + 3] == [(found[place][0], n) for n in range(3)] for place in range(0, 60, 3))


def test_every_column_has_a_type() -> None:
    assert {column.kind for column in COLUMNS.values()} == {int, float, str, bool}
