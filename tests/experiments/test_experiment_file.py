from pathlib import Path

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.experiment_file import SHARED_FIELDS, read_experiment
from hsplit_flwr.experiments.main import SETTING_NAMES, main
from hsplit_flwr.experiments.records import EMBEDDED_DATA, RunSpec

METHODS, SETTINGS = ("ours", "theirs", "other"), ("alike", "unlike")
MATRIX = """
[matrix]
methods = ["ours", "theirs"]
settings = ["alike", "unlike"]
partitions = ["iid"]
seeds = [0, 1]
"""
RATES = """
[learning_rates]
ours = 0.003
theirs = 1
"""


def read(folder: Path, text: str) -> tuple[RunSpec, ...]:
    path = folder / "experiment.toml"
    path.write_text(text)
    return read_experiment(path, METHODS, SETTINGS)


def test_every_combination_is_a_run_and_first_seeds_come_first(tmp_path: Path) -> None:
    specs = read(tmp_path, MATRIX + RATES)
    assert [(spec.seed, spec.setting, spec.method) for spec in specs] == [
        (0, "alike", "ours"),
        (0, "alike", "theirs"),
        (0, "unlike", "ours"),
        (0, "unlike", "theirs"),
        (1, "alike", "ours"),
        (1, "alike", "theirs"),
        (1, "unlike", "ours"),
        (1, "unlike", "theirs"),
    ]
    assert [spec.learning_rate for spec in specs[:2]] == [0.003, 1.0]
    assert specs[0] == RunSpec("ours", "alike", "iid", 0, 0.003)  # all else: defaults


def test_shared_fields_reach_every_run(tmp_path: Path) -> None:
    specs = read(tmp_path, '[run]\nmodel = "smollm2"\nrounds = 7\nalpha = 1\n' + MATRIX + RATES)
    assert {(spec.model, spec.rounds, spec.alpha) for spec in specs} == {("smollm2", 7, 1.0)}
    assert type(specs[0].alpha) is float  # a whole number would give the run another key


def test_cuts_ranks_and_learning_rates_are_lists_of_the_matrix(tmp_path: Path) -> None:
    specs = read(tmp_path, MATRIX + "cuts = [1, 2]\nranks = [4]\nlearning_rates = [0.1, 1]\n")
    assert len(specs) == len(set(specs)) == 2 * 2 * 2 * 2 * 2
    assert {(spec.cut, spec.rank, spec.learning_rate) for spec in specs} == {
        (1, 4, 0.1),
        (1, 4, 1.0),
        (2, 4, 0.1),
        (2, 4, 1.0),
    }


def test_a_search_has_rates_of_its_own_for_every_method(tmp_path: Path) -> None:
    """One grid for all spent half of its runs far from where a method could be best."""
    specs = read(tmp_path, MATRIX.replace("[0, 1]", "[0]") + RATES.replace("0.003", "[0.003, 0.03]"))
    assert [(spec.method, spec.learning_rate) for spec in specs][:3] == [
        ("ours", 0.003),
        ("theirs", 1.0),
        ("ours", 0.03),
    ]
    assert len(specs) == 2 * 3  # settings, pairs of method and rate


def test_a_relative_data_folder_counts_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    folder = tmp_path / "experiments"
    folder.mkdir()
    assert read(folder, '[run]\ndata = "../data/e2e"\n' + MATRIX + RATES)[0].data == str(tmp_path / "data" / "e2e")
    assert read(folder, '[run]\ndata = "/data/e2e"\n' + MATRIX + RATES)[0].data == "/data/e2e"
    assert read(folder, '[run]\ndata = ""\n' + MATRIX + RATES)[0].data == ""


@pytest.mark.parametrize("name", EMBEDDED_DATA)
def test_the_name_of_an_embedded_set_is_no_folder(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, f'[run]\ndata = "{name}"\n' + MATRIX + RATES)[0].data == name
    with pytest.raises(ConfigError, match="Rename the folder"):  # in a store both would be one data set
        read(tmp_path, f'[run]\ndata = "./{name}"\n' + MATRIX + RATES)


def test_the_file_knows_the_embedded_sets() -> None:
    from hsplit_flwr.experiments.instructions import is_instructions
    from hsplit_flwr.experiments.task import EMBEDDED

    assert {name for name in EMBEDDED_DATA if not is_instructions(name)} | {""} == set(EMBEDDED)


def test_learning_rates_of_methods_that_do_not_run_may_stay(tmp_path: Path) -> None:
    assert len(read(tmp_path, MATRIX + RATES + "other = 0.5\n")) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", r"Expected a TOML file with an experiment at .*experiment\.toml, found"),
        (MATRIX + RATES + "[extra]\n", r"experiment\.toml: .*in the file, found 'extra'"),
        ("[run]\nround = 3\n" + MATRIX + RATES, r"in \[run\], found 'round'"),
        ("[run]\nseed = 3\n" + MATRIX + RATES, r"in \[run\], found 'seed'"),
        ("[run]\nrounds = 3.0\n" + MATRIX + RATES, r"Expected \[run\] rounds as a whole number, found 3\.0"),
        ("[run]\nrounds = true\n" + MATRIX + RATES, r"Expected \[run\] rounds as a whole number, found True"),
        ("[run]\nrounds = 0\n" + MATRIX + RATES, r"experiment\.toml: Expected rounds as a whole number >= 1, found 0"),
        ("[run]\nalpha = inf\n" + MATRIX + RATES, r"Expected \[run\] alpha as a finite number, found inf"),
        ("[run]\nmodel = 3\n" + MATRIX + RATES, r"Expected \[run\] model as a string, found 3"),
        ("run = 3\n" + MATRIX + RATES, r"Expected \[run\] as a table, found 3"),
        (RATES, r"Expected \[matrix\] methods as a list with at least one value, found nothing"),
        (MATRIX.replace("[0, 1]", "[]") + RATES, r"\[matrix\] seeds as a list with at least one value, found \[\]"),
        (MATRIX.replace("[0, 1]", "0") + RATES, r"\[matrix\] seeds as a list with at least one value, found 0"),
        (MATRIX.replace("[0, 1]", "[0, 0]") + RATES, r"every value of \[matrix\] seeds once"),
        (MATRIX.replace("[0, 1]", "[0, 'a']") + RATES, r"Expected \[matrix\] seeds as a whole number, found 'a'"),
        (MATRIX.replace("[0, 1]", "[-1]") + RATES, r"experiment\.toml: Expected seed as a whole number >= 0, found -1"),
        (MATRIX.replace("seeds", "seed") + RATES, r"in \[matrix\], found 'seed'"),
        (MATRIX.replace("theirs", "thiers") + RATES, r"\[matrix\] methods among other, ours, theirs, found 'thiers'"),
        (MATRIX.replace("unlike", "odd") + RATES, r"\[matrix\] settings among alike, unlike, found 'odd'"),
        (MATRIX.replace("iid", "sorted") + RATES, r"experiment\.toml: Expected partition .* found 'sorted'"),
        (MATRIX, r"learning rate for every method in \[learning_rates\], found none for ours, theirs"),
        (MATRIX + RATES + "our = 1\n", r"\[learning_rates\] among other, ours, theirs, found 'our'"),
        (MATRIX + RATES.replace("0.003", "'a'"), r"\[learning_rates\] ours as a finite number, found 'a'"),
        (MATRIX + RATES.replace("0.003", "[]"), r"\[learning_rates\] ours as a list with at least one value"),
        (MATRIX + RATES.replace("0.003", "[1, 1.0]"), r"Expected every value of \[learning_rates\] ours once"),
        (MATRIX + RATES.replace("0.003", "0.0"), r"learning_rate and alpha > 0, found 0\.0"),
        (MATRIX + "learning_rates = [1]\n" + RATES, r"learning rates in one place, found both"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a TOML file with an experiment at .*none\.toml, found"):
        read_experiment(tmp_path / "none.toml", METHODS, SETTINGS)


def test_every_field_of_a_run_is_set_in_one_place() -> None:
    lists = {"method", "setting", "partition", "seed", "cut", "rank", "learning_rate"}
    assert not lists & set(SHARED_FIELDS)
    assert lists | set(SHARED_FIELDS) == set(RunSpec.field_names())


def test_the_command_knows_the_settings() -> None:
    from hsplit_flwr.experiments.settings import SETTINGS as REAL

    assert tuple(REAL) == SETTING_NAMES


def test_a_dry_run_lists_the_runs_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(
        '[matrix]\nmethods = ["hsplitlora", "ft"]\nsettings = ["homogeneous"]\npartitions = ["iid"]\nseeds = [3]\n'
        "cuts = [2]\n[learning_rates]\nhsplitlora = 0.003\nft = 1e-4\n"
    )
    assert main(["run", str(path), "--store", str(tmp_path / "results.csv"), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "hsplitlora homogeneous iid seed 3 lr 0.003 cut 2",
        "ft homogeneous iid seed 3 lr 0.0001 cut 2",
        "2 of 2 runs to do",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_file_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text("[matrix]\nmethods = ['nobody']\n")
    assert main(["run", str(path), "--store", str(tmp_path / "results.csv")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m hsplit_flwr.experiments: error: {path}: Expected")
    assert error.count("\n") == 1
