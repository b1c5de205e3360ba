"""The adapter of the best round so far, on disk beside the newest results.

::

    RUN/best/round-0003/adapter/    of the model as it was scored after round 3

A run that is resumed from an earlier checkpoint may need the adapter of the round that was the best by then. So those
stay, too, that were the best when a checkpoint was saved which is still kept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hsplit_flwr.common.whole_folder import discard, remove_leftovers, whole_folder
from hsplit_flwr.reports.best_round import best_round
from hsplit_flwr.reports.records import BestRound, RoundRecord

BEST, ADAPTER = "best", "adapter"


class BestAdapters:
    """The adapters of rounds that were the best, in a run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, history: Sequence[RoundRecord], export: Callable[[Path], object]) -> None:
        """Let `export` write the adapter of the round that was just scored into a folder, if it is the best one.

        Raises:
            OSError: a full disk or an unwritable folder; earlier adapters stay as they are.
            AggregationError: nothing has changed, or something is not finite.
        """
        best = best_round(history)
        if best is None or best.round != history[-1].round:
            return
        with whole_folder(self._of(best.round)) as unfinished:
            export(unfinished / ADAPTER)

    def prune(self, history: Sequence[RoundRecord], resumable: Iterable[int]) -> None:
        """Remove all but the best of `history`, and the best up to each round that can be resumed after."""
        upto = [history, *([one for one in history if one.round <= number] for number in resumable)]
        needed = {self._of(best.round).name for records in upto if (best := best_round(records))}
        for found in (self._folder / BEST).glob("round-*"):
            if found.name not in needed:
                discard(found)
        remove_leftovers(self._folder / BEST, "round-*")

    def named(self, history: Sequence[RoundRecord]) -> BestRound | None:
        """The best round, with its adapter if that is there."""
        best = best_round(history)
        if best is None:
            return None
        adapter = self._of(best.round) / ADAPTER
        there = adapter.relative_to(self._folder).as_posix() if adapter.is_dir() else ""
        return replace(best, adapter=there)

    def _of(self, round_number: int) -> Path:
        return self._folder / BEST / f"round-{round_number:04d}"
