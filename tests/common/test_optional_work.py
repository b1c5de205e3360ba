"""Work that a run can do without: said once a cause, counted, and never swallowed whole."""

import pytest

from hsplit_flwr.common.optional_work import OptionalWork
from hsplit_flwr.errors import ConfigError, ExchangeError


def attempt(work: OptionalWork, *errors: BaseException) -> None:
    for error in errors:
        with work.spared():
            raise error


def test_each_cause_is_said_once_with_its_place_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    work = OptionalWork("no picture")
    attempt(
        work, OSError("disk 1"), OSError("disk 2"), KeyError("x"), ExchangeError("a", "A."), ExchangeError("b", "B.")
    )
    assert [record.getMessage() for record in caplog.records] == [
        "no picture: OSError: disk 1",
        "no picture: KeyError: 'x'",
        "no picture: [a] A.",
        "no picture: [b] B.",
    ]
    assert [bool(record.exc_info) for record in caplog.records] == [True, True, False, False]
    caplog.clear()
    work.close()
    assert [record.getMessage() for record in caplog.records] == ["no picture: 2 times in all (OSError)"]
    caplog.clear()
    attempt(work, OSError("disk 3"))
    assert caplog.messages == ["no picture: OSError: disk 3"]


def test_work_that_succeeds_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    work = OptionalWork("no picture")
    with work.spared():
        pass
    work.close()
    assert caplog.messages == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_is_not_stopped(end: type[BaseException]) -> None:
    with pytest.raises(end):
        attempt(OptionalWork("no picture"), end())


def test_our_own_errors_say_themselves_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    attempt(OptionalWork("no picture"), ConfigError("Expected a folder, found none. Make one."))
    assert caplog.messages == ["no picture: Expected a folder, found none. Make one."]
