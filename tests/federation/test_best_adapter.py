"""Adapters of the best rounds on disk: whole, of the right round, and those that a resumed run may need."""

from pathlib import Path

import pytest

from hsplit_flwr.federation.best_adapter import BestAdapters
from hsplit_flwr.reports.records import RoundRecord
from tests.reports.test_best_round import rounds

FILE = "adapter_model.safetensors"


def play(folder: Path, history: list[RoundRecord], resumable: list[int]) -> None:
    """A round's end: what is kept says which round wrote it."""

    def export(adapter: Path) -> None:
        adapter.mkdir()
        (adapter / FILE).write_text(f"of round {history[-1].round}")

    adapters = BestAdapters(folder)
    adapters.keep(history, export)
    adapters.prune(history, resumable)


def kept(folder: Path) -> dict[str, str]:
    return {path.name: (path / "adapter" / FILE).read_text() for path in sorted((folder / "best").iterdir())}


def test_the_best_adapter_stays_as_it_was_when_its_round_was_scored(tmp_path: Path) -> None:
    history = rounds(9.0, 7.0, 8.0, 6.0)
    seen = []
    for number in range(1, 5):
        play(tmp_path, history[:number], resumable=[number])
        seen.append(kept(tmp_path))
    assert seen == [
        {"round-0001": "of round 1"},
        {"round-0002": "of round 2"},
        {"round-0002": "of round 2"},
        {"round-0004": "of round 4"},
    ]
    named = BestAdapters(tmp_path).named(history)
    assert named
    assert (named.round, named.perplexity, named.adapter) == (4, 6.0, "best/round-0004/adapter")


def test_the_best_of_every_checkpoint_stays(tmp_path: Path) -> None:
    """A run that is resumed after round 2 has that round as its best, though round 3 was better."""
    history = rounds(9.0, 7.0, 6.0)
    for number in range(1, 4):
        play(tmp_path, history[:number], resumable=[number - 1, number])
    assert list(kept(tmp_path)) == ["round-0002", "round-0003"]


def test_a_round_that_is_played_again_replaces_what_it_left(tmp_path: Path) -> None:
    history = rounds(9.0, 7.0)
    play(tmp_path, history, [1, 2])
    BestAdapters(tmp_path).prune(history[:1], [1])  # resumed after round 1
    assert not list((tmp_path / "best").iterdir())
    play(tmp_path, history, [2])
    assert kept(tmp_path) == {"round-0002": "of round 2"}


def test_half_an_adapter_is_none(tmp_path: Path) -> None:
    history = rounds(9.0, 7.0, 6.0)
    play(tmp_path, history[:1], [1])

    def full_disk(adapter: Path) -> None:
        adapter.mkdir()
        (adapter / FILE).write_text("half")
        raise OSError(28, "No space left on device")

    adapters = BestAdapters(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        adapters.keep(history[:2], full_disk)
    assert kept(tmp_path) == {"round-0001": "of round 1"}
    named = adapters.named(history[:2])
    assert named
    assert (named.round, named.adapter) == (2, ""), "the best round is known, its adapter is not there"


def test_nothing_is_written_of_a_round_that_is_not_better(tmp_path: Path) -> None:
    BestAdapters(tmp_path).keep(rounds(7.0, 8.0), lambda folder: pytest.fail("round 2 is no better"))
    assert not (tmp_path / "best").exists()
