"""The weights everyone agrees on: the base W_0 on disk plus the cumulative delta, in any segment of the model."""

import hashlib
from collections.abc import Collection, Iterable
from functools import cached_property

import torch
from torch import Tensor

from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.delta_log import DeltaLog, Parts
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.factors import Increment
from hsplit_flwr.lora.merge import merge_beneath
from hsplit_flwr.lora.places import Place
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.lora.update_rounding import UpdateRounding, shortened
from hsplit_flwr.models.equality import require_cuttable
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import PLAIN
from hsplit_flwr.models.segments import block_of, linear_shapes, load_segment
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.loss import Score, score_segment

_SAMPLED_VALUES = 64
"""of each tensor, to tell base models apart"""


class GlobalModel:
    """The server's whole model, always at the newest version of the weights. It never has adapters.

    What a tail has learnt and not merged yet is not in it: `TailRounds` has a view that counts it.

    Args:
        files: the base model, quantised or not.
        dtype: of the weights that train and serve; the delta itself is float32.
        device: where the model lives.

    Raises:
        UnsupportedModelError: head and tail would not compute what the model computes.
    """

    def __init__(self, files: ModelFiles, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        require_cuttable(files.config)
        self.files = files
        self.segment = load_segment(files, dtype=dtype, device=device)
        self.log = DeltaLog()
        self._rounding = UpdateRounding()
        self.brought: Increment = {}
        """the part of the delta that the tail's adapters bring, and that the weights therefore lack"""

    def keep_delta_in(self, place: Place) -> None:
        """Keep what the delta grows by there, instead of in memory."""
        self.log.total.place = self._rounding.place = place

    def send_updates_by(self, coding: UpdateCoding) -> None:
        """How updates go to the clients from now on, and so how they are merged here."""
        self._rounding.coding = coding if self.files.quantization else coding.merged()

    @property
    def num_blocks(self) -> int:
        """L, the number of blocks; a cut is 1..L-1."""
        return self.segment.num_blocks

    @cached_property
    def identity(self) -> dict[str, str | int]:
        """What tells this base model from another: its form, and a SHA-256 over a sample of each tensor of W_0."""
        digest = hashlib.sha256()
        for name in self.files.weight_names():
            tensor = self.files.read(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)].contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return {
            "type": str(self.files.config.model_type),
            "blocks": self.num_blocks,
            "dtype": str(self.segment.dtype),
            "quantization": self.files.quantization.method if self.files.quantization else PLAIN,
            "weights": digest.hexdigest(),
        }

    def head_names(self, cut: int) -> list[str]:
        """The linear layers of blocks 0..cut-1, in the order of the model."""
        return [name for name in self.segment.linear_modules() if block_of(name) < cut]

    def apply_update(self, update: Increment, parts: Parts, brought: Increment | None = None) -> int:
        """Add what is sent of a round's update, `parts` of which are clients' own; merge it; returns the version."""
        sent = self._rounding.round(update)
        return self.apply(sent, parts if sent is update else None, brought)

    def apply(self, increment: Increment, parts: Parts | None = None, brought: Increment | None = None) -> int:
        """Add an increment as it is and merge it; returns the new version. `brought`: None, what it is stays so."""
        version = self._append(increment, parts)
        self.bring(self.brought if brought is None else brought, increment)
        return version

    def bring(self, adapters: Increment, changed: Collection[str] = ()) -> None:
        """Form the weights anew for `adapters` to be what is `brought`, and where the delta has `changed`."""
        former, self.brought = self.brought, adapters
        names = {**former, **adapters}
        moved = [name for name in names if name not in changed and former.get(name) is not adapters.get(name)]
        self._merge([*changed, *moved])

    def add_residuals(self) -> None:
        """Add what the updates that were sent lack of the exact ones. At the end of a run.

        Not beside a quantised base: there it stays what `delta_error` tells.
        """
        if self.files.quantization:
            return
        if residuals := self._rounding.take_residuals():
            self.log.add_dense(residuals)
            self._merge(residuals)

    @property
    def delta_error(self) -> float | None:
        """How far what stands beside a quantised base is from what was trained, relatively; None: nothing is lost."""
        return self._rounding.relative_error(self.log.total) if self.files.quantization else None

    def _append(self, increment: Increment, parts: Parts | None) -> int:
        added, replaced = self._rounding.bound(increment, self.log.total)
        return self.log.append(added, parts, replaced)

    def since(self, have: int, cut: int, own: OwnRound | None = None) -> tuple[int, bool, dict[str, Tensor]]:
        """What a head of `cut` blocks at version `have` lacks: (version, whether that is the whole, tensors).

        Of what its client trained in the round `own` it gets only where it belongs.
        """
        update = self.log.since(have, self.head_names(cut), own=own)
        return update.version, update.base is None, shortened(update.to_tensors(), self._rounding.coding)

    def score(self, batches: Iterable[Batch]) -> Score:
        """Score of the merged weights on `batches`. Raises `ConfigError`, see `score_segment`."""
        return score_segment(self.segment, batches)

    def state(self) -> State:
        """The cumulative delta, its version and residuals; the base W_0 stays in its files."""
        return {"log": self.log.state(), "residuals": self._rounding.state()}

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave. The weights are formed anew from W_0.

        Raises:
            ConfigError: this model has changed already.
            AggregationError: the delta is malformed, or of another model.
        """
        if self.log.version:
            raise ConfigError(
                f"Expected a model at version 0 to load a state into, found version {self.log.version}. "
                "Load it before the first round."
            )
        shapes = linear_shapes(self.segment)
        self._rounding.load_state(state["residuals"], shapes)
        self.log.load_state(state["log"], shapes)
        self._merge(self.log.total.names())

    def _merge(self, names: Iterable[str]) -> None:
        merge_beneath(self.segment, self.files, self.log.total, self.brought, names)
