"""FLOPs of real steps, as `torch.utils.flop_counter` counts them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hsplit_flwr.models.segments import Segment

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""the counter knows attention on a GPU only; on the CPU it is the same products under another name"""


def head_flops(head: Segment, batch: Mapping[str, Tensor]) -> int:
    """One step of a head (with its adapters), whatever gradient comes in."""

    def step() -> None:
        hidden = head(batch["input_ids"], batch["attention_mask"])
        if hidden.requires_grad:
            hidden.backward(torch.ones_like(hidden))

    return _count(step)


def tail_flops(tail: Segment, batch: Mapping[str, Tensor]) -> int:
    """One step of a tail (with its adapters), whatever activations come in."""
    hidden = torch.randn(*batch["input_ids"].shape, tail.hidden_size, requires_grad=True)

    def step() -> None:
        logits = tail(hidden, batch["attention_mask"], entry=tail.start)
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()  # type: ignore[no-untyped-call]

    return _count(step)


def _count(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    return int(counter.get_total_flops())
