"""One side of `state_memory.py` in a process of its own: the peak of its resident memory in every round."""

import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from _head_process import forget_peak, resident_bytes

from hsplit_flwr.federation.client_data import DeltaStore
from hsplit_flwr.federation.client_store import FileStore
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.trained_head import Shapes
from hsplit_flwr.lora.delta_update import DeltaReplica, DeltaUpdate, OwnFactors
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors, Shape, init_lora_A
from hsplit_flwr.lora.merge import merge_delta
from hsplit_flwr.lora.places import ScratchFolder
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import linear_shapes, load_segment
from hsplit_flwr.training.host_memory import return_freed_tensors, trim_heap
from hsplit_flwr.training.kept_adapters import KeptAdapters

Play = Callable[[int], None]
"""plays the round of that number"""


class MemoryStore:
    """A `DeltaStore` in this process: how it was before `FileStore`."""

    def __init__(self) -> None:
        self._replica = DeltaReplica()

    def open(self, run: str, client: str, shapes: Shapes) -> AbstractContextManager[DeltaReplica]:
        """See `DeltaStore`."""
        return self._opened()

    def keep_own(self, run: str, client: str, own: OwnFactors) -> None:
        """See `DeltaStore`. Nothing is trained here."""

    def keep_adapters(self, run: str, client: str, kept: KeptAdapters) -> None:
        """See `DeltaStore`. Nothing is trained here."""

    def kept_adapters(self, run: str, client: str, round_number: int) -> None:
        """See `DeltaStore`: nothing."""

    @contextmanager
    def _opened(self) -> Iterator[DeltaReplica]:
        yield self._replica


def increment(shapes: dict[str, Shape], rank: int, seed: int) -> dict[str, LoraFactors]:
    """A round's update: random factors of `rank` for every matrix."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            init_lora_A(rank, d_in, seed), 1e-3 * torch.randn(d_out, rank, generator=generator), scaling=1.0
        )
        for name, (d_out, d_in) in shapes.items()
    }


def update(received: dict[str, LoraFactors], base: int | None, version: int) -> DeltaUpdate:
    """What a client is sent: the increment since `base`; the whole, which is the same, where it holds nothing."""
    if base is not None:
        return DeltaUpdate(base, version, received, WeightDelta())
    whole = WeightDelta()
    whole.add(received)
    return DeltaUpdate(None, version, {}, whole)


def client(files: ModelFiles, order: dict[str, Any], store: DeltaStore) -> Play:
    """A head's weights, loaded and brought up to date as in `HeadClient`."""

    def play(number: int) -> None:
        head = load_segment(files, 0, order["cut"], dtype=torch.bfloat16)
        shapes = linear_shapes(head)
        with store.open("run", "0", shapes) as replica:
            replica.apply(update(increment(shapes, order["rank"], number), replica.version, number), shapes)
            merge_delta(head, files, replica.total, replica.total.names())

    return play


def server(files: ModelFiles, order: dict[str, Any], folder: Path | None) -> Play:
    """A round's increment goes into the weights, and a client gets what it lacks."""
    model = GlobalModel(files, torch.bfloat16)
    if folder:
        model.keep_delta_in(ScratchFolder(folder))
    shapes = linear_shapes(model.segment)

    def play(number: int) -> None:
        version = model.apply(increment(shapes, order["rank"], number))
        model.since(version - 1, order["cut"])

    return play


def main() -> None:
    """All rounds of one side; a line of JSON for each."""
    order = json.loads(sys.argv[1])
    return_freed_tensors()
    files = ModelFiles.resolve(order["model"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sides: dict[str, Callable[[], Play]] = {
            "client, files": lambda: client(files, order, FileStore(folder)),
            "client, memory": lambda: client(files, order, MemoryStore()),
            "server, files": lambda: server(files, order, folder),
            "server, memory": lambda: server(files, order, None),
        }
        play = sides[order["side"]]()
        for number in range(1, order["rounds"] + 1):
            gc.collect()
            trim_heap()
            forget_peak()
            started = time.perf_counter()
            play(number)
            seconds = time.perf_counter() - started
            disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            row = {"round": number, "peak_bytes": resident_bytes("VmHWM"), "disk_bytes": disk, "seconds": seconds}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
