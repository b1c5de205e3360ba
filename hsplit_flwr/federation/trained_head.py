"""What a client brings home from a training round: by name, whoever carries it, and checked before it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.factors import LoraFactors, changes, check_factors
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.training.config import ClientPlan

A_SUFFIX, B_SUFFIX = "|A", "|B"
IMPORTANCE = "importance"
"""the array with the importance of the head's linear layers, in the order of `HeadReply.layers`"""
LARGEST_FACTOR = 1e6
"""in an adapter: trained ones are of order 1"""
LARGEST_IMPORTANCE = 1e15
"""of a layer"""
Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, int]]
"""module name -> (d_out, d_in)"""


@dataclass(frozen=True, kw_only=True)
class TrainedHead:
    """One client's round of training."""

    client: str
    factors: Mapping[str, LoraFactors]
    """whole-model module name -> its adapter, or what training changed in one that was kept (`lora.factors.changes`)"""
    importance: Mapping[str, float]
    """of every linear layer of the head by whole-model name; empty where none was measured"""
    tokens: int
    """target tokens trained on, as the client counts them"""
    loss: float
    """own mean loss over the steps, nats per token"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """by phase, see `reports.records.CLIENT_PHASES`; the client's own word"""
    budget: Budget | None = None
    """what the client can afford from the next round on, if it says"""
    upload_bytes: int = 0
    """of the arrays that carried it"""
    kept_from: int = 0
    """the round whose adapters these go on from; 0: they restarted"""
    handed_in: Mapping[str, LoraFactors] = field(default_factory=dict)
    """the adapters themselves, where they may be kept"""

    @property
    def adapters(self) -> Mapping[str, LoraFactors]:
        """The adapters themselves by module name, whether or not they were kept."""
        return self.handed_in or self.factors

    def since(self, start: Mapping[str, LoraFactors]) -> "TrainedHead":
        """The same with what training changed since the adapters were `start`."""
        return replace(self, factors=changes(self.adapters, start), handed_in=self.adapters)

    def to_arrays(self) -> dict[str, Array]:
        """Arrays by name: ``NAME|A`` (r, d_in) and ``NAME|B`` (d_out, r) of every adapter, then ``importance``."""
        arrays: dict[str, Array] = {}
        for name, factors in self.adapters.items():
            arrays[f"{name}{A_SUFFIX}"], arrays[f"{name}{B_SUFFIX}"] = factors.A.numpy(), factors.B.numpy()
        arrays[IMPORTANCE] = np.array(list(self.importance.values()), dtype=np.float32)
        return arrays


@dataclass(frozen=True)
class Refusal:
    """A client's reason for not training, with the figures."""

    client: str
    reason: str
    budget: Budget | None = None
    """what the client can afford from the next round on, if it says"""


@dataclass(frozen=True, kw_only=True)
class HeadReply:
    """What came back from a client that trained: unpacked, and not to be trusted yet (`read_trained`)."""

    client: str
    """as the reply itself says"""
    arrays: Mapping[str, Array]
    """as `TrainedHead.to_arrays` gives them"""
    layers: tuple[str, ...]
    """the linear layers whose importance was measured, in the order of its array"""
    tokens: int
    loss: float
    seconds: Mapping[str, float]
    budget: Budget | None
    upload_bytes: int
    kept_from: int = 0
    """see `TrainedHead`"""


def read_trained(reply: HeadReply, client: str, plan: ClientPlan, head_shapes: Shapes) -> TrainedHead:
    """The trained head in `reply`, if it is what `client` was asked for.

    Args:
        reply: what came back.
        client: who was asked.
        plan: what it was asked for.
        head_shapes: the linear layers of its head, in the order of the model.

    Raises:
        AggregationError: of another client, not exactly the planned arrays, not finite, or absurdly large.
    """
    if reply.client != client:
        raise AggregationError(f"Expected a result that names client {client!r}, found {reply.client!r:.80}.")
    names = plan.lora.targets(head_shapes)
    expected = {f"{name}{suffix}" for name in names for suffix in (A_SUFFIX, B_SUFFIX)} | {IMPORTANCE}
    if differing := sorted(expected ^ set(reply.arrays)):
        raise AggregationError(
            f"Expected {len(expected)} arrays, A and B of every planned module and the importance, found "
            f"{len(reply.arrays)}, which differ in {differing[:3]}."
        )
    return TrainedHead(
        client=client,
        factors={name: _read_factors(reply.arrays, name, plan, head_shapes[name]) for name in names},
        importance=_read_importance(reply, list(head_shapes)),
        tokens=reply.tokens,
        loss=reply.loss,
        seconds=reply.seconds,
        budget=reply.budget,
        upload_bytes=reply.upload_bytes,
        kept_from=reply.kept_from,
    )


def _read_factors(arrays: Mapping[str, Array], name: str, plan: ClientPlan, shape: tuple[int, int]) -> LoraFactors:
    A, B = arrays[f"{name}{A_SUFFIX}"], arrays[f"{name}{B_SUFFIX}"]
    (d_out, d_in), rank = shape, plan.lora.rank(name)
    if A.shape != (rank, d_in) or B.shape != (d_out, rank) or {str(A.dtype), str(B.dtype)} != {"float32"}:
        raise AggregationError(
            f"Expected float32 A {(rank, d_in)} and B {(d_out, rank)} for {name}, "
            f"found {A.dtype} {A.shape} and {B.dtype} {B.shape}."
        )
    factors = LoraFactors(_owned(A), _owned(B), plan.lora.scaling(name))
    check_factors(factors)
    largest = max((float(tensor.abs().max()) for tensor in (factors.A, factors.B) if tensor.numel()), default=0.0)
    if largest > LARGEST_FACTOR:
        raise AggregationError(
            f"Expected adapters without figures beyond {LARGEST_FACTOR:g}, found {largest:g} in {name}."
        )
    return factors


def _owned(array: Array) -> Tensor:
    """A tensor of `array`; a copy where what carried it is read-only."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _read_importance(reply: HeadReply, names: list[str]) -> dict[str, float]:
    values = reply.arrays[IMPORTANCE]
    if values.size == 0 and not reply.layers:
        return {}
    if values.shape != (len(names),) or str(values.dtype) != "float32" or sorted(reply.layers) != sorted(names):
        raise AggregationError(
            f"Expected float32 importance of {len(names)} linear layers, found {values.dtype} "
            f"{values.shape} for {len(reply.layers)} layers."
        )
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise AggregationError("Expected finite importance >= 0, not all of it 0, found other values.")
    if values.max() > LARGEST_IMPORTANCE:
        raise AggregationError(f"Expected importance of at most {LARGEST_IMPORTANCE:g}, found {values.max():g}.")
    found = dict(zip(reply.layers, values.tolist(), strict=True))
    return {name: found[name] for name in names}
