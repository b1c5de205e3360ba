"""What an app's server finds out before the first round, once, instead of every client in every round."""

from pathlib import Path
from typing import Any

import pytest

from hsplit_flwr.data.restaurants import check_partitions, restaurant_examples
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.flower.apps import ServerSide, legacy_components, message_strategy
from hsplit_flwr.flower.run_config import read_settings
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles

MODEL = str(tiny_checkpoint())
FACES = pytest.mark.parametrize("face", [legacy_components, message_strategy])


def side(folder: Path, check_data: Any = lambda: None, **config: Any) -> ServerSide:
    run_config = {"cuts": "1", "ranks": "2", "output-dir": str(folder / "out"), **config}
    return ServerSide(
        app="app",
        run_config=run_config,
        settings=read_settings(run_config, folder),
        model_name=MODEL,
        files=ModelFiles.resolve(MODEL),
        eval_batches=[],
        check_data=check_data,
    )


@FACES
def test_rows_beyond_the_positions_are_refused(face: Any, tmp_path: Path) -> None:
    """ "index out of range in self" in every client."""
    with pytest.raises(ConfigError, match=r"Expected max-length of at most \d+, the positions of 'gpt2', found 1000"):
        face(side(tmp_path, **{"max-length": 1000}))


@FACES
def test_a_partition_that_cannot_be_is_refused(face: Any, tmp_path: Path) -> None:
    """Each of 100 clients found out by itself, in fit and again in evaluate: 173 s, "completed"."""
    assert len(restaurant_examples()[0]) == 1600
    with pytest.raises(ConfigError, match="dirichlet-alpha"):
        face(side(tmp_path, lambda: check_partitions(100, alpha=0.3)))
    assert not (tmp_path / "out").exists()
