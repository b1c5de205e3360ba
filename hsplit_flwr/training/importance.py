"""Important weight identification: which weight matrices the loss leans on, measured during training.

The resource-normalized gradient-weight product of a matrix W (d_out, d_in) is ``sum |W * dL/dW| / (d_in + d_out)``: the
first-order estimate of how much its entries matter to the loss, per unit of what one unit of rank costs there (A and B
have d_in + d_out entries per rank). HSplitLoRA (arXiv:2505.02795) names the idea; its exact expression is not public,
this one is ours.

L is the mean loss over the *sampled rows* of one client's batch. The weights stay frozen: ``dL/dW = delta^T x`` is
formed from the layer's input x and the gradient delta at its output as that gradient passes by, tile by tile, and
thrown away. Nothing that training computes is changed.

Shape suffixes: B batch, T tokens, N sampled positions, I d_in, O d_out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hsplit_flwr.common.state import State
from hsplit_flwr.errors import UnsupportedModelError
from hsplit_flwr.lora.segment_adapters import ADAPTER
from hsplit_flwr.models.adaptable import sees_all
from hsplit_flwr.models.quantized import weight_of
from hsplit_flwr.models.segments import Segment, block_of, linear_shape
from hsplit_flwr.training.loss import target_tokens

TILE_BYTES = 8 << 20
"""the most of one gradient that is held at once (float32)"""


@dataclass(frozen=True)
class SampledRows:
    """Rows [start, stop) of a batch, on which one client's importance is measured."""

    start: int
    stop: int
    scale: float
    """turns the gradient of the objective that is being trained into that of the mean loss over these rows"""


def sample_rows(labels: Tensor, rows: int, start: int = 0, objective_tokens: int | None = None) -> SampledRows | None:
    """The first `rows` rows (0: all) of one client's `labels` (B, T), which begin at row `start` of the batch.

    `objective_tokens` is the number of target tokens over which the trained objective is a mean; by default the
    client's own. None if the sampled rows hold no target token: they have no loss.
    """
    sampled = labels[:rows] if rows else labels
    tokens = target_tokens(sampled)
    if tokens == 0:
        return None
    return SampledRows(start, start + len(sampled), (objective_tokens or target_tokens(labels)) / tokens)


@torch.no_grad()
def gradient_weight_product(weight: Tensor, x_NI: Tensor, delta_NO: Tensor) -> Tensor:
    """``sum |W * G|`` as a float32 scalar on the weight's device.

    G is the gradient of `weight` in its own layout: ``delta^T x`` for an ``nn.Linear`` (O, I), ``x^T delta`` for a
    ``Conv1D`` (I, O), in which case give `delta_NO` first.
    """
    per_tile = max(1, TILE_BYTES // (4 * weight.shape[1]))
    right = x_NI.float()
    left = delta_NO.float()
    total = torch.zeros((), device=weight.device)
    for first in range(0, weight.shape[0], per_tile):
        stop = first + per_tile
        tile = left[:, first:stop].T @ right
        total += tile.mul_(weight[first:stop]).abs_().sum()  # not vector_norm: it adds up one by one, which loses 1e-4
    return total


class ImportanceProbe:
    """Measures every linear layer of a segment, adapted or not, in the one forward and backward pass of its `with`.

    Args:
        segment: whose layers are measured, from block `entry` on; nobody else may train on it meanwhile.
        samples: disjoint ranges of the batch's rows, each measured by itself. Empty: nothing is hooked.
        batch_shape: (B, T) of that batch.
        entry: the block at which the pass enters the segment.

    Raises:
        UnsupportedModelError: (in the pass) a layer does not see every position of the batch once, in order.
    """

    def __init__(
        self, segment: Segment, samples: Sequence[SampledRows], batch_shape: Sequence[int], entry: int = 0
    ) -> None:
        self._segment = segment
        self._samples = samples
        self._batch_shape = tuple(batch_shape)
        linears = segment.linear_modules() if samples else {}
        self._layers = {name: layer for name, layer in linears.items() if block_of(name) >= entry}
        self._sums: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._tap, name, self._adapter_dtype(name))))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def values(self) -> list[dict[str, float]]:
        """Per sample: whole-model module name -> importance, in nats of mean loss per unit of rank cost.

        0 for a layer that no gradient reached. A layer used twice counts the sum of both uses.
        """
        rows = torch.stack([torch.stack(parts) for parts in self._sums.values()]).tolist() if self._sums else []
        sums = dict(zip(self._sums, rows, strict=True))
        cost = {name: sum(linear_shape(layer)) for name, layer in self._layers.items()}
        return [
            {name: sample.scale * sums[name][i] / cost[name] if name in sums else 0.0 for name in self._layers}
            for i, sample in enumerate(self._samples)
        ]

    def _adapter_dtype(self, name: str) -> torch.dtype | None:
        wrapper: Any = self._segment.model.get_submodule(self._segment.local_name(name))
        return wrapper.lora_A[ADAPTER].weight.dtype if hasattr(wrapper, "lora_A") else None

    def _tap(
        self, name: str, adapter_dtype: torch.dtype | None, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor
    ) -> Tensor | None:
        """Forward hook: lets the gradient of the layer's output come by `_measure` (that of its LoRA layer is equal).

        In a pass that is computed again (gradient checkpointing) it does so to a graph that no gradient runs through.
        """
        if not torch.is_grad_enabled():
            return None
        # LoRA's A keeps its input for the backward pass anyway; elsewhere a view would keep the rest of the batch too.
        shared = adapter_dtype == inputs[0].dtype and not self._segment.gradient_checkpointing
        rows = self._sampled(name, inputs[0])
        rows = rows if shared else [part.clone() for part in rows]
        tapped = out if out.requires_grad else _require_grad(out)
        tapped.register_hook(partial(self._measure, name, layer, rows))  # type: ignore[no-untyped-call]
        return tapped

    def _measure(self, name: str, layer: nn.Module, rows: list[Tensor], delta: Tensor) -> None:
        weight = weight_of(layer)
        transposed = not isinstance(layer, nn.Linear)
        deltas = self._sampled(name, delta)
        sums = [
            gradient_weight_product(weight, *((part, x) if transposed else (x, part)))
            for x, part in zip(rows, deltas, strict=True)
        ]
        rows.clear()  # the graph, and so this hook, may outlive the step
        before = self._sums.get(name)
        self._sums[name] = [a + b for a, b in zip(before, sums, strict=True)] if before else sums

    def _sampled(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The (N, width) rows of each sample in a layer's input or output gradient: (B, ..., width) or flattened."""
        B, T = self._batch_shape
        if not sees_all(tensor.shape, (B, T)):
            raise UnsupportedModelError(
                f"Expected {name} to see all {B} x {T} positions of the batch, found {tuple(tensor.shape)}. "
                "Importance cannot be told per client there; set importance_steps to 0."
            )
        whole = tensor.detach().reshape(B, T, -1)
        return [whole[sample.start : sample.stop].flatten(0, 1) for sample in self._samples]


class _RequireGrad(torch.autograd.Function):
    """A copy of a tensor that needs no gradient, which gets one: before a model's first adapter nothing does."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _require_grad(out: Tensor) -> Tensor:
    required: Tensor = _RequireGrad.apply(out, out.new_zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return required


class MeanImportance:
    """The mean over the steps of a round that counted."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Count one step; one with a value that is not finite does not count."""
        if all(map(math.isfinite, values.values())):
            self._steps += 1
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def mean(self) -> dict[str, float]:
        """Module name -> importance; empty if no step counted."""
        return {name: total / self._steps for name, total in self._sums.items()}

    def state(self) -> State:
        """The steps that counted, and the sums over them."""
        return {"steps": self._steps, "sums": dict(self._sums)}

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave."""
        self._steps, self._sums = state["steps"], dict(state["sums"])
