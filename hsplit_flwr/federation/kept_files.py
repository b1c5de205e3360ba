"""Adapters that a client keeps for a later round, as files beside its copy of the weight delta.

::

    kept-ROUND-SHA256.safetensors    adapters as the round left them, and what the optimizer remembers

Those of the round before stay, too, for a round that is played again: a message may be sent twice.
"""

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hsplit_flwr.common.state_files import save_tensors, with_tensors, without_tensors
from hsplit_flwr.federation.delta_folder import KEPT_ADAPTERS, sha256_of
from hsplit_flwr.training.kept_adapters import KeptAdapters

_VALUES = "hsplit"
_ROUNDS = 2
"""of which adapters stay"""
_log = logging.getLogger("hsplit_flwr")


def save_kept(folder: Path, kept: KeptAdapters) -> None:
    """Keep `kept` in `folder`, and what was kept last.

    Raises:
        OSError: a full disk, or a folder that cannot be written.
    """
    beside = folder / f".{KEPT_ADAPTERS}unfinished"
    tensors: dict[str, Tensor] = {}
    values = json.dumps(without_tensors(kept.state(), tensors))
    save_tensors(tensors, beside, {_VALUES: values})
    for path in folder.glob(f"{KEPT_ADAPTERS}{kept.round_number}-*"):
        path.unlink(missing_ok=True)
    beside.replace(folder / f"{KEPT_ADAPTERS}{kept.round_number}-{sha256_of(beside)}.safetensors")
    for path in sorted(folder.glob(f"{KEPT_ADAPTERS}*"), key=_round_of)[:-_ROUNDS]:
        path.unlink(missing_ok=True)


def load_kept(folder: Path, round_number: int) -> KeptAdapters | None:
    """What round `round_number` left in `folder`; None: nothing, or nothing that is whole."""
    for path in folder.glob(f"{KEPT_ADAPTERS}{round_number}-*"):
        try:
            if sha256_of(path) != path.stem.rpartition("-")[2]:
                raise ValueError("other content than was written")
            with safe_open(path, "pt") as file:
                values = json.loads(file.metadata()[_VALUES])
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # no mapping
            return KeptAdapters.of_state(with_tensors(values, tensors))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.warning("adapters that a client kept in %s are damaged, they restart: %s", path, error)
    return None


def _round_of(path: Path) -> int:
    return int(path.stem.split("-")[1])
