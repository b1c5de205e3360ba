"""How a run ends before its last round: Flower's loops know no other way than an exception."""

import logging

from hsplit_flwr.federation.round_server import RoundServer

_log = logging.getLogger("hsplit_flwr")


class EnoughRoundsError(Exception):
    """The rounds so far are enough. No failure: whoever started Flower's loop takes it for the loop's end."""


def end_if_enough(rounds: RoundServer) -> None:
    """Leave Flower's loop, after a round, where no more are to be played.

    Raises:
        EnoughRoundsError: so it is.
    """
    if why := rounds.enough:
        _log.info("the run ends after round %d of %d: %s", rounds.history[-1].round, rounds.training.rounds, why)
        raise EnoughRoundsError(why)
