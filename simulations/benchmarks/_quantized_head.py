"""A head of `quantized.py` in a process of its own: what its weights take, and how long a step is."""

import gc
import json
import statistics
import sys
import time
from typing import Any

# All imports of a client first: the memory baseline is taken after them.
import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
from _head_process import resident_bytes
from _models import MODELS

from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_rounding import is_bounded
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import QuantizedLayer
from hsplit_flwr.models.segments import Segment, linear_shape, load_segment
from hsplit_flwr.training.host_memory import return_freed_tensors, trim_heap

SEED = 0
WARM_UPS = 1


def storages(head: Segment) -> dict[int, int]:
    """Address -> bytes of all that the head's weights lie in, scales and tables of quantised ones included."""
    tensors = [*head.parameters(), *head.buffers()]
    for layer in head.model.modules():
        if isinstance(layer, QuantizedLayer):
            state: Any = getattr(layer.weight, "quant_state", None) or layer.state
            tensors += [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
            tensors += layer.beside
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def loaded(order: dict[str, Any], cut: int) -> Segment:
    """A head whose weights are all in memory."""
    files = ModelFiles.resolve(MODELS[order["model"]]()).quantized_by(order["quantization"])
    head = load_segment(files, 0, cut, dtype=DTYPES[order["dtype"]])
    for parameter in head.parameters():
        parameter.data.clone()
    return head


def stand_beside(head: Segment, rank: int) -> None:
    """As after so many rounds that the largest rank is reached, or a dense matrix takes no more bytes."""
    for layer in head.linear_modules().values():
        if isinstance(layer, QuantizedLayer):
            d_out, d_in = shape = linear_shape(layer)
            factors = torch.zeros(rank, d_in), torch.zeros(d_out, rank)
            layer.stand(*(factors if is_bounded(rank, shape) else (torch.zeros(shape),)))


def step_seconds(head: Segment, order: dict[str, Any]) -> float:
    """Forward and backward pass with adapters everywhere, median."""
    SegmentAdapters(head, LoraSpec(order["rank"], 2.0 * order["rank"])).reset(SEED)
    shape = (order["batch_size"], order["sequence_length"])
    ids = torch.randint(0, head.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))
    seconds = []
    for _ in range(WARM_UPS + order["repeats"]):
        started = time.perf_counter()
        hidden = head(ids, torch.ones_like(ids))
        hidden.backward(torch.ones_like(hidden))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UPS:])


def settled() -> int:
    """Resident bytes once what was freed is given back."""
    gc.collect()
    trim_heap()
    return resident_bytes("VmRSS")


def main() -> None:
    """A head of one block to start the runtime, then the one that counts."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    return_freed_tensors()
    first = loaded(order, 1)
    held = sum(storages(first).values())
    baseline = settled()
    head = loaded(order, order["cut"])
    report: dict[str, Any] = {
        # Embeddings and first block are in the process twice by then; they cancel in the difference of tensors alone.
        "resident_bytes": settled() - baseline,
        "head_bytes": sum(storages(head).values()),
        "block_bytes": (sum(storages(head).values()) - held) // (order["cut"] - 1),
    }
    report["step_s"] = step_seconds(head, order)
    if order["quantization"] != "none":
        stand_beside(head, order["delta_rank"])
        report["head_bytes_beside"] = sum(storages(head).values())
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
