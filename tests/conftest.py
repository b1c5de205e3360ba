"""Settings of the whole suite: one thread per process (tiny tensors, shared cores), nothing installed by Flower.

With ``pytest -n N`` a file is one worker's, so that what its tests share is made once. Files that start Flower are all
the same worker's: two clusters of Ray, or time limits of two federations at once, would disturb each other.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import bitsandbytes  # noqa: F401, here: it logs an exception as it is imported, whose frames pytest keeps
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def what_clients_keep_on_disk_goes_with_the_suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(tmp_path_factory.mktemp("flwr")))
        yield


@pytest.fixture(autouse=True)
def pictures_are_drawn_where_a_test_looks_at_them(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing is a fifth of a short run in the test's own process. Module fixtures and other processes draw theirs."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr("hsplit_flwr.federation.run_output.draw", lambda *_: None)


FLOWER = {
    "tests/flower/test_simulation.py",
    "tests/flower/test_resume_simulation.py",
    "tests/flower/test_deployment.py",
    "tests/flower/test_finetune_app.py",
    "tests/test_readme.py",
}
"""files whose tests start Flower's processes"""


def scope(nodeid: str) -> str:
    """What of the suite is one worker's at a time."""
    file = nodeid.partition("::")[0]
    return "Flower" if file in FLOWER else file


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`-n` alone asks for `make_scheduler`, and for the order of `pytest_collection_modifyitems`."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`scope` by `scope` (pytest-xdist; absent without `-n`)."""
    from xdist.scheduler import LoadFileScheduling

    class ByScope(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByScope(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among several workers what takes longest begins first, so that no worker is left with it alone at the end."""
    if not hasattr(config, "workerinput"):
        return
    slow = {scope(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (scope(item.nodeid) != "Flower", scope(item.nodeid) not in slow))
