"""What a step of training is, as far as its costs are concerned."""

from dataclasses import dataclass, replace
from typing import Self

from hsplit_flwr.common.checks import require, require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.update_coding import DELTA_RANK
from hsplit_flwr.training.config import TrainingConfig, require_codecs, require_passes

WEIGHT_DTYPES = ("fp32", "bf16", "fp16")
"""keys of `models.dtypes.DTYPES`"""
ATTENTIONS = ("auto", "sdpa", "eager")
"""as `models.files` has them"""
QUANTIZATIONS = PLAIN, *_ = ("none", "nf4", "fp4", "int8")
"""as `models.quantized` has them, which takes seconds to import"""


@dataclass(frozen=True)
class Workload:
    """The batches that costs are predicted for, and how they are trained on. Larger ones than these are refused.

    What `TrainingConfig` says, too, comes from there: see `of`.
    """

    batch_size: int = 8
    """rows"""
    sequence_length: int = 64
    """tokens of a row, padding included"""
    local_steps: int = TrainingConfig.local_steps
    """steps of a round"""
    dtype: str = "fp32"
    """of the frozen weights, and so of the activations inside a segment"""
    activation_codec: str = TrainingConfig.activation_codec
    """on the wire, up"""
    gradient_codec: str = TrainingConfig.gradient_codec
    """on the wire, down"""
    gradient_checkpointing: bool = False
    """heads compute the activations of a block again in the backward pass instead of keeping them"""
    importance_steps: int = TrainingConfig.importance_steps
    """steps of a round that also measure importance; 0: none"""
    importance_rows: int = TrainingConfig.importance_rows
    """rows of a batch that it is measured on; 0: all"""
    micro_batches: int = TrainingConfig.micro_batches
    """parts that a batch travels in"""
    micro_batches_in_flight: int = TrainingConfig.micro_batches_in_flight
    """parts that a head keeps until their gradients come"""
    micro_steps: bool = TrainingConfig.micro_steps
    """each part has an optimizer step, and so adapters of its own while it is in flight"""
    joint_steps: bool = TrainingConfig.joint_steps
    """the tail computes on all clients at once"""
    keep_adapters: bool = TrainingConfig.keep_adapters
    """heads keep their adapters from round to round, and what a round changed in one has twice its rank"""
    tail_passes: int = TrainingConfig.tail_passes
    """of the tail over the batches of a step; those after the first once the clients have their answers"""
    activation_cache_mib: int = TrainingConfig.activation_cache_mib
    """the most that the tail keeps of activations from round to round"""
    lora_dropout: float = TrainingConfig.lora_dropout
    """share of an adapter's input that is dropped: masks are kept for the backward pass"""
    autocast: str = TrainingConfig.autocast
    """what training passes compute in, beside the weights' dtype"""
    quantization: str = PLAIN
    """of the linear layers' frozen weights, which then compute in `dtype`; one of `QUANTIZATIONS`"""
    delta_rank: int = DELTA_RANK
    """largest rank of what training changed, where it stands beside quantised weights; 0: any"""
    attn_implementation: str = ATTENTIONS[0]
    """of attention, one of `ATTENTIONS`"""

    def __post_init__(self) -> None:
        require_whole("batch_size", self.batch_size, 1)
        require_whole("sequence_length", self.sequence_length, 1, key="max-length")
        require_whole("local_steps", self.local_steps, 1)
        require_whole("importance_steps", self.importance_steps, 0)
        require_whole("importance_rows", self.importance_rows, 0)
        require_whole("activation_cache_mib", self.activation_cache_mib, 0)
        require_whole("micro_batches", self.micro_batches, 1)
        require_whole("micro_batches_in_flight", self.micro_batches_in_flight, 1)
        require_whole("tail_passes", self.tail_passes, 1)
        require(self.dtype in WEIGHT_DTYPES, "dtype", f"as one of {WEIGHT_DTYPES}", self.dtype)
        require(self.quantization in QUANTIZATIONS, "quantization", f"as one of {QUANTIZATIONS}", self.quantization)
        attention = self.attn_implementation
        require(attention in ATTENTIONS, "attn_implementation", f"as one of {ATTENTIONS}", attention)
        require_whole("delta_rank", self.delta_rank, 0)
        require_codecs(self.activation_codec, self.gradient_codec)
        require_passes(self.lora_dropout, self.autocast)

    @classmethod
    def of(
        cls,
        training: TrainingConfig,
        *,
        batch_size: int = batch_size,
        sequence_length: int = sequence_length,
        dtype: str = dtype,
        quantization: str = quantization,
        delta_rank: int = delta_rank,
        attn_implementation: str = attn_implementation,
        gradient_checkpointing: bool = gradient_checkpointing,
    ) -> Self:
        """The workload of a run that trains by `training`, on batches of at most this size.

        Raises:
            ConfigError: a value out of range.
        """
        return cls(
            batch_size=batch_size,
            sequence_length=sequence_length,
            local_steps=training.local_steps,
            dtype=dtype,
            quantization=quantization,
            delta_rank=delta_rank,
            attn_implementation=attn_implementation,
            activation_codec=training.activation_codec,
            gradient_codec=training.gradient_codec,
            gradient_checkpointing=gradient_checkpointing,
            importance_steps=training.importance_steps,
            importance_rows=training.importance_rows,
            micro_batches=training.micro_batches,
            micro_batches_in_flight=training.micro_batches_in_flight,
            micro_steps=training.micro_steps,
            joint_steps=training.joint_steps,
            keep_adapters=training.keep_adapters,
            tail_passes=training.tail_passes,
            activation_cache_mib=training.activation_cache_mib,
            lora_dropout=training.lora_dropout,
            autocast=training.autocast,
        )

    @property
    def part(self) -> Self:
        """The workload of the largest part alone."""
        return replace(self, batch_size=-(-self.batch_size // self.micro_batches), micro_batches=1)

    @property
    def change_rank(self) -> int:
        """Rank of what a round changes in an adapter, in ranks of that adapter."""
        return 2 if self.keep_adapters else 1

    @property
    def adapter_copies(self) -> int:
        """What is held beside an adapter that goes on from round to round, in adapters: what the round started from,
        and beside a quantised weight also what that weight lacks of the delta."""
        return (1 + (self.quantization != PLAIN)) * self.keep_adapters

    @property
    def parts_alive(self) -> int:
        """Parts of which a head keeps activations at a time; with micro-steps also those of the next batch."""
        in_flight = self.micro_batches_in_flight
        return in_flight if self.micro_steps else min(self.micro_batches, self.batch_size, in_flight)

    @property
    def measured_rows(self) -> int:
        """Rows of a batch on which weight importance is measured, all of its first part; 0: it is not measured."""
        if not self.importance_steps:
            return 0
        rows = self.part.batch_size
        return min(self.importance_rows or rows, rows)

    def check(self, training: TrainingConfig) -> None:
        """Refuse a run that trains otherwise than the costs are predicted for.

        Raises:
            ConfigError: other steps, codecs or micro-batches, or importance that is measured on other rows.
        """
        trained = type(self).of(training, batch_size=self.batch_size)
        for name in (
            *("local_steps", "activation_codec", "gradient_codec", "measured_rows", "joint_steps"),
            *("micro_batches", "parts_alive", "micro_steps", "tail_passes", "activation_cache_mib"),
            *("lora_dropout", "autocast", "keep_adapters"),
        ):
            expected, found = getattr(trained, name), getattr(self, name)
            if expected != found:
                raise ConfigError(
                    f"Expected a workload of {name}={expected!r} as in training, found {found!r}. "
                    "Make it from the training settings: Workload.of(training, ...)."
                )
