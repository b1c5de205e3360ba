import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hsplit_flwr.data import e2e as e2e_data
from hsplit_flwr.data.text_batches import Example
from hsplit_flwr.errors import ConfigError

pytest.importorskip("flwr_datasets")

REPO = Path(__file__).parents[2]
E2E = Path(os.environ.get("HSPLIT_FLWR_E2E", REPO.parent / "shared" / "data" / "e2e"))
needs_e2e = pytest.mark.skipif(not (E2E / "train.csv").is_file(), reason="needs E2E NLG (HSPLIT_FLWR_E2E)")


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("mr", "ref")) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def small_rows(count: int) -> list[tuple[str, str]]:
    """Sorted by food, as the published file is sorted by name; every fifth row has no food."""
    foods = ("food[Thai], ", "food[Greek], ", "food[Mexican], ", "food[Korean], ", "")
    return [
        (f"name[Bar {i}], {foods[i * 5 // count]}customer rating[5 out of 5]", f'Bar {i}, "nice" é.')
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_csv(tmp_path / "train.csv", small_rows(200))
    write_csv(tmp_path / "valid.csv", small_rows(10))
    return str(tmp_path)


def all_parts(source: str, num_partitions: int, **options: Any) -> list[list[Example]]:
    return [
        e2e_data.client_examples(source, i, num_partitions=num_partitions, **options) for i in range(num_partitions)
    ]


def label_counts(part: list[Example], field: str = "food") -> Counter[str]:
    return Counter(example.slots.get(field, "none") for example in part)


def test_parse_mr_reads_names_with_spaces_and_signs() -> None:
    mr = "name[Café Adriatic, Inc.], customer rating[5 out of 5], priceRange[£20-25], near[]"
    assert e2e_data.parse_mr(mr) == {
        "name": "Café Adriatic, Inc.",
        "customer rating": "5 out of 5",
        "priceRange": "£20-25",
        "near": "",
    }


@pytest.mark.parametrize("mr", ["", "There is a bar.", "name[Bar], nonsense", "name[Bar] food[Thai]", "name[Bar"])
def test_parse_mr_refuses_what_is_no_meaning_representation(mr: str) -> None:
    with pytest.raises(ConfigError, match=r"Expected a meaning representation such as .* found .* not swapped"):
        e2e_data.parse_mr(mr)


def test_validation_examples_keep_file_order_and_text(folder: str) -> None:
    examples = e2e_data.validation_examples(folder)
    assert [(example.mr, example.ref) for example in examples] == small_rows(10)
    assert examples[0].slots == {"name": "Bar 0", "food": "Thai", "customer rating": "5 out of 5"}


@pytest.mark.parametrize("partition_by", ["iid", "food", "customer rating"])
def test_every_row_is_in_exactly_one_partition(folder: str, partition_by: str) -> None:
    parts = all_parts(folder, 4, partition_by=partition_by, alpha=1.0)
    assert Counter((example.mr, example.ref) for part in parts for example in part) == Counter(small_rows(200))


def test_iid_parts_are_equal_in_size_and_mixed(folder: str) -> None:
    parts = all_parts(folder, 4, partition_by="iid")
    assert [len(part) for part in parts] == [50] * 4
    for part in parts:  # 10 of each of the 5 labels are expected; the sorted file would give 50 or 0
        assert set(label_counts(part)) == {"Thai", "Greek", "Mexican", "Korean", "none"}
        assert max(label_counts(part).values()) <= 20


def test_alpha_decides_the_skew(folder: str) -> None:
    even = all_parts(folder, 4, partition_by="food", alpha=1000.0)
    assert all(abs(count - 10) <= 2 for part in even for count in label_counts(part).values())
    skewed = all_parts(folder, 4, partition_by="food", alpha=0.3)
    assert max(max(label_counts(part).values()) / len(part) for part in skewed) > 0.5
    assert min(len(part) for part in skewed) >= e2e_data.MIN_EXAMPLES


def test_arguments_alone_decide_the_parts(folder: str) -> None:
    first = all_parts(folder, 4, seed=1)
    e2e_data._partitioner.cache_clear()  # as another process
    assert all_parts(folder, 4, seed=1) == first
    assert all_parts(folder, 4, seed=2) != first


def test_validation_alone_imports_neither_datasets_nor_flwr_datasets(folder: str) -> None:
    code = (
        "import sys; from hsplit_flwr.data import e2e as e2e_data\n"
        "assert len(e2e_data.validation_examples(sys.argv[1])) == 10\n"
        "assert not {'datasets', 'flwr_datasets', 'peft', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, folder]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    subprocess.run(command, check=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition_id": 4}, "Expected partition_id from 0 to 3, found 4"),
        ({"partition_id": -1}, "Expected partition_id from 0 to 3, found -1"),
        ({"num_partitions": 201}, r"Expected at most 200 partitions \(examples\), found 201"),
        (
            {"partition_by": "colour"},
            r"'iid' or one of \['customer rating', 'food', 'name'\], found 'colour'",
        ),
        ({"alpha": 0.0}, r"Expected 4 parts .* alpha=0\.0, found none: Alpha values .* Lower num_partitions"),
        ({"num_partitions": 150}, r"Expected 150 parts of at least 8 examples by 'food' .* raise alpha"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_partitions_that_cannot_be_made_are_refused(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        e2e_data.client_examples(folder, **({"partition_id": 0, "num_partitions": 4} | options))


@pytest.mark.parametrize("options", [{"num_partitions": 150}, {"partition_by": "colour"}, {"source": "no//folder"}])
def test_a_server_can_find_out_what_every_client_would(folder: str, options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"source": folder, "num_partitions": 4} | options
    with pytest.raises(ConfigError) as of_a_client:
        e2e_data.client_examples(**given, partition_id=0)
    with pytest.raises(ConfigError) as of_the_server:
        e2e_data.check_partitions(**given)
    assert str(of_the_server.value) == str(of_a_client.value)
    e2e_data.check_partitions(folder, num_partitions=4)


def test_a_server_finds_out_about_missing_validation_rows(folder: str) -> None:
    (Path(folder) / "valid.csv").unlink()
    with pytest.raises(ConfigError, match=r"Expected the file valid\.csv"):
        e2e_data.check_partitions(folder, num_partitions=4)


def test_missing_files_columns_and_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a folder with train\.csv and valid\.csv, found no folder"):
        e2e_data.validation_examples(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"Expected the file valid\.csv in .*, found none"):
        e2e_data.validation_examples(str(tmp_path))
    write_csv(tmp_path / "valid.csv", small_rows(3), header=("meaning", "text"))
    with pytest.raises(ConfigError, match=r"columns mr and ref in valid\.csv, found \['meaning', 'text'\]"):
        e2e_data.validation_examples(str(tmp_path))
    write_csv(tmp_path / "valid.csv", [])
    with pytest.raises(ConfigError, match="Expected at least one row"):
        e2e_data.validation_examples(str(tmp_path))


def test_a_row_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "valid.csv").write_text("mr,ref\nname[Bar],A bar.\nname[Owl]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Expected a sentence in row 2 of valid\.csv, found none"):
        e2e_data.validation_examples(str(tmp_path))


def test_hub_data_set_is_read_by_its_own_column_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict(
            {"human_reference": ["A bar.", "An inn."], "meaning_representation": ["name[Bar]", "name[Inn]"]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples = e2e_data.validation_examples("owner/e2e_nlg")
    assert asked == [("owner/e2e_nlg", "validation")]
    assert examples[1] == Example("name[Inn]", "An inn.", {"name": "Inn"})


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach {name}.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"found neither at 'e2e_nlg': Couldn't reach .* Offline, give the folder"):
        e2e_data.validation_examples("e2e_nlg")


@needs_e2e
def test_real_e2e_parts() -> None:
    parts = all_parts(str(E2E), 5, partition_by="food", alpha=0.3)
    assert sum(map(len, parts)) == 4126
    assert {label for part in parts for label in label_counts(part)} == {"English", "Chinese", "none"}
    assert min(map(len, parts)) >= e2e_data.MIN_EXAMPLES
    validation = e2e_data.validation_examples(str(E2E))
    assert len(validation) == 546
    assert not {e.mr for e in validation} & {e.mr for part in parts for e in part}
    assert all(e.ref.strip() and e.slots["name"] for part in [*parts, validation] for e in part)
