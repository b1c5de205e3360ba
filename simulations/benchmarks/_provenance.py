"""What every benchmark writes beside its figures, so that they can be repeated and compared."""

import os
from typing import Any

import torch

from hsplit_flwr.common.provenance import command, commit, versions


def provenance(seed: int) -> dict[str, Any]:
    """Commit (None outside of a checkout), versions, seed, command, the machine's cores and torch's threads."""
    return {
        "commit": commit(),
        "versions": versions(),
        "seed": seed,
        "command": command(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
