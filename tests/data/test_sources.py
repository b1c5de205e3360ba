"""Rows come out of every kind of source alike, and what is wrong with one is named by its line or row."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from hsplit_flwr.data.sources import read_rows
from hsplit_flwr.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"text": "The Mill"},
    {"text": 'a "quoted", long\ntext'},
    {"text": "日本 🙂 é"},
    {"text": "line\u2028separator\x85and\x0bmore"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """`rows` as a source of the kind that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(path)
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("name", ["own.jsonl", "own.json", "own.csv", "own.parquet", "folder"])
def test_every_kind_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    """Separators of Unicode lines inside of a text are no ends of lines."""
    rows = read_rows(write(tmp_path / name, ROWS))
    assert [dict(row.values) for row in rows] == ROWS
    assert [row.place for row in rows] == [
        f"{'line' if name.endswith('jsonl') else 'row'} {number} of {name}" for number in range(1, 5)
    ]


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.parquet", "folder"])
def test_messages_come_through(name: str, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    (row,) = read_rows(write(tmp_path / name, rows))
    assert [dict(message) for message in row.values["messages"]] == rows[0]["messages"]


def test_a_folder_with_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert [row.values["text"] for row in read_rows(str(tmp_path / "both"))] == ["train"]
    assert [row.values["text"] for row in read_rows(str(tmp_path / "both"), "test")] == ["test"]
    with pytest.raises(ConfigError, match=r"Expected data-split as one of \['test', 'train'\], found 'validation'"):
        read_rows(str(tmp_path / "both"), "validation")


def test_a_name_of_the_hub_is_asked_for_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("someone/own-set", "train_sft")
    assert asked == [("someone/own-set", "train_sft")]
    assert rows[2].place == "row 3 of someone/own-set"


def test_a_name_that_the_hub_does_not_have_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(name: str, split: str) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match=r"found no file or folder /.*/someone/none, and .*'someone/none'.*no route"):
        read_rows("someone/none")


@pytest.mark.parametrize("name", ["own.jsonl", "own.json", "own.csv"])
def test_a_byte_order_mark_and_crlf_are_no_content(name: str, tmp_path: Path) -> None:
    rows = [{"text": "first"}, {"text": "second"}]
    path = Path(write(tmp_path / name, rows))
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert [dict(row.values) for row in read_rows(str(path))] == rows


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [(row.place, row.values["text"]) for row in read_rows(str(path))] == [
        ("line 1 of own.json", "a"),
        ("line 3 of own.json", "b"),
    ]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    """Python's csv stops at 131,072 characters unless told otherwise."""
    rows = [{"text": "x" * 200_000}]
    assert [dict(row.values) for row in read_rows(write(tmp_path / "own.csv", rows))] == rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.jsonl", b""),
        ("own.jsonl", b"\n \n"),
        ("own.jsonl", b"\xef\xbb\xbf"),
        ("own.json", b""),
        ("own.json", b"[]"),
        ("own.csv", b""),
        ("own.csv", b"text\r\n"),
    ],
)
def test_empty_files_are_said_to_be_empty(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"Expected at least one row in .*own\.\w+, found none"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.jsonl", b'{"text": "a"}\n{"text": \n', r"Expected JSON in line 2 of own\.jsonl, found: Expecting value"),
        ("own.jsonl", b'{"text": "a"} {"text": "b"}\n', r"Expected JSON in line 1 of own\.jsonl, found: Extra data"),
        ("own.jsonl", b'{"text": "a"}\n["b"]\n', r"Expected an object such as .* in line 2 of own\.jsonl, found"),
        ("own.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"Expected UTF-8 in line 2 of own\.jsonl"),
        ("own.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"Expected UTF-8 in own\.jsonl, found UTF-16"),
        ("own.jsonl", b"[" * 100_000, r"Expected JSON in line 1 of own\.jsonl"),
        ("own.json", b'"text"', r"Expected a list of objects in own\.json, found str"),
        ("own.json", b'[{"text": "a"}, 3]', r"Expected an object such as .* in row 2 of own\.json, found '3'"),
        ("own.json", b'[{"text": "a"}', r"Expected JSON in own\.json, found"),
        ("own.csv", b"a,b\r\n1,2\r\n3\r\n", r"Expected 2 cells in row 2 of own\.csv \(line 3\).*found 1"),
        ("own.csv", b"a,b\r\n1,2,3\r\n", r"Expected 2 cells in row 1 of own\.csv \(line 2\).*found 3"),
        ("own.csv", b'a,b\r\n1,"2\r\n', r"Expected CSV in own\.csv, found after row 0"),
        ("own.csv", b"a\r\n\xe9\r\n", r"Expected UTF-8 in own\.csv"),
        ("own.parquet", b"PAR1 not really", r"Expected a Parquet file at .*own\.parquet, found"),
        ("own.docx", b"x", r"Expected a \.jsonl, .*found the file .*own\.docx"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(str(path))


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "missing.csv", "../gone"])
def test_a_source_that_is_not_there_says_where_it_was_looked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"found nothing at .* \(looked for /.*\)"):
        read_rows(name)


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="Expected a folder written by save_to_disk, found"):
        read_rows(str(tmp_path))
