"""What the simulations share: a FLWR_HOME, and a run that nothing happened to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.flower import FIVE_NODES, QUICKSTART, RUN_S, WHOLE, FlowerHome, flower_home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerHome]:
    with flower_home(tmp_path_factory.mktemp("flower") / "home") as started:
        yield started


@pytest.fixture(scope="session")
def whole(home: FlowerHome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the quickstart by `WHOLE` on five nodes, on the legacy face."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    log = home.run(QUICKSTART, {**WHOLE, "output-dir": str(folder)}, *FIVE_NODES, timeout_s=RUN_S)
    assert f"Results: {folder}" in "\n".join(log.splitlines()[-8:])
    return folder
