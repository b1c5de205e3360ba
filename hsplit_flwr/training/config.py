"""What a run is made of, as data: training settings and a client's plan."""

import math
from dataclasses import dataclass

from hsplit_flwr.common.checks import is_above, is_at_least, is_whole, require, require_whole
from hsplit_flwr.lora.spec import LoraSpec

WIRE_CODECS = ("fp32", "bf16", "fp16", "int8", "int4", "int4_stochastic")
"""keys of `exchange.codecs.CODECS`, which lies above and is not imported here"""
SCHEDULES = ("linear", "cosine", "constant")
AUTOCASTS = ("none", "bf16")
"""torch's; fp16 would need its losses scaled, and the tail's and the heads' gradients with them"""


def require_codecs(activation_codec: str, gradient_codec: str) -> None:
    """Refuses a codec that this version does not have.

    Raises:
        ConfigError: naming the setting, what there is and what was found.
    """
    for name, value in (("activation_codec", activation_codec), ("gradient_codec", gradient_codec)):
        require(value in WIRE_CODECS, name, f"as one of {WIRE_CODECS}", value)


def require_passes(lora_dropout: float, autocast: str) -> None:
    """Refuses training passes that there are not.

    Raises:
        ConfigError: naming the setting, what there is and what was found.
    """
    share = is_at_least(lora_dropout, 0) and lora_dropout < 1
    require(share, "lora_dropout", ">= 0 and < 1", lora_dropout)
    require(autocast in AUTOCASTS, "autocast", f"as one of {AUTOCASTS}", autocast)


@dataclass(frozen=True)
class TrainingConfig:
    """How heads and tail train: one optimizer under one learning-rate schedule that spans the whole run.

    Adapters that are aggregated restart every round (unless `keep_adapters`), and the optimizer with them; the schedule
    does not.
    Head and tail clip their own gradients to `max_grad_norm` (0: no clipping).
    """

    rounds: int = 5
    local_steps: int = 20
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    activation_codec: str = "fp32"
    """how activations travel up to the tail, one of `WIRE_CODECS`"""
    gradient_codec: str = "fp32"
    """how their gradients travel down to the heads, one of `WIRE_CODECS`"""
    seed: int = 0
    importance_steps: int = 1
    """the first steps of every round that also measure weight importance (`training/importance.py`); 0: none"""
    importance_rows: int = 2
    """rows of each batch that importance is measured on; 0: all"""
    joint_steps: bool = False
    """the tail takes one optimizer step on the batches of all clients of a step; else one on each client's batch"""
    tail_passes: int = 1
    """over the batches of a step; those after the first are the tail's alone, taken once the clients have their answers
    and compute"""
    optimizer: str = "adamw"
    """one of `optimizer.OPTIMIZERS`, of heads and tail alike"""
    micro_batches: int = 1
    """parts by rows, of about equal size, that a client's batch travels in: while one is at the tail, the next is
    computed and sent. Batches of fewer rows have fewer parts"""
    micro_batches_in_flight: int = 2
    """parts whose gradient a head may be waiting for at a time: they and their activations take its memory"""
    micro_steps: bool = False
    """heads and tail take an optimizer step on each part, and a head goes on with the next one, be it of the next
    batch, while others are in flight; else they take one on the whole batch, as if it were in one piece"""
    keep_adapters: bool = False
    """heads and tail keep the adapters of blocks that heads hold, and what the optimizer knows of them, from round to
    round, and what a round changed in them is aggregated; else they are merged whole and restart"""
    activation_cache_mib: int = 0
    """the most that the server keeps of activations of heads that train nothing, of all clients together: what comes
    again is not sent again. 0: nothing"""
    lora_dropout: float = 0.0
    """share of what each adapter is given that is dropped in training, in heads and tail"""
    autocast: str = "none"
    """one of `AUTOCASTS`: what torch's autocast computes in during training passes, whatever the weights are"""

    def __post_init__(self) -> None:
        from hsplit_flwr.training.optimizer import OPTIMIZERS  # torch: who only reads the defaults need not wait for it

        for name in ("rounds", "local_steps", "tail_passes", "micro_batches", "micro_batches_in_flight"):
            require_whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "importance_steps", "importance_rows", "activation_cache_mib"):
            require_whole(name, getattr(self, name), 0)
        require(is_above(self.learning_rate, 0), "learning_rate", "> 0", self.learning_rate)
        require(is_at_least(self.weight_decay, 0), "weight_decay", ">= 0", self.weight_decay)
        require(is_at_least(self.max_grad_norm, 0), "max_grad_norm", ">= 0 (0: no clipping)", self.max_grad_norm)
        require(self.schedule in SCHEDULES, "schedule", f"as one of {SCHEDULES}", self.schedule)
        require(self.optimizer in OPTIMIZERS, "optimizer", f"as one of {tuple(OPTIMIZERS)}", self.optimizer)
        require_passes(self.lora_dropout, self.autocast)
        require_codecs(self.activation_codec, self.gradient_codec)
        by_chance = self.activation_cache_mib > 0 and self.activation_codec == "int4_stochastic"
        expected = "that rounds the same every time where activation-cache-mib is above 0"
        require(not by_chance, "activation_codec", expected, self.activation_codec)

    @property
    def parts_in_flight(self) -> int:
        """Parts of one client that may be on their way at a time."""
        return self.micro_batches_in_flight if self.micro_batches > 1 or self.micro_steps else 1

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one client over the whole run."""
        return self.rounds * self.local_steps

    def first_step(self, round_number: int) -> int:
        """The run step (0-based) at which round `round_number` (from 1) starts."""
        return (round_number - 1) * self.local_steps

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of run step `step` (0-based): linear warm-up, then the schedule down to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = max(0.0, 1.0 - done)
        return self.learning_rate * (left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


@dataclass(frozen=True)
class ClientPlan:
    """One client's share: its head holds blocks 0..cut-1 and trains adapters by `lora` on them."""

    cut: int
    lora: LoraSpec

    def __post_init__(self) -> None:
        require(is_whole(self.cut, 1), "a cut", ">= 1 (blocks held by the client)", self.cut, key="cuts")
