"""What a step of training is, as far as its costs are concerned."""

from dataclasses import dataclass

from hsplit_flwr.errors import ConfigError

WEIGHT_DTYPES = ("fp32", "bf16", "fp16")
"""keys of `models.dtypes.DTYPES`"""
ACTIVATION_DTYPES = ("fp32", "bf16", "fp16")
"""the wire codecs: keys of `exchange.codecs.CODECS`, which lies above and is not imported here"""


@dataclass(frozen=True)
class Workload:
    """The batches that costs are predicted for, and how they are trained on. Larger ones than these are refused."""

    batch_size: int = 8
    """rows"""
    sequence_length: int = 64
    """tokens of a row, padding included"""
    local_steps: int = 20
    """steps of a round"""
    dtype: str = "fp32"
    """of the frozen weights, and so of the activations inside a segment"""
    activation_dtype: str = "fp32"
    """on the wire"""
    gradient_checkpointing: bool = False
    """heads compute the activations of a block again in the backward pass instead of keeping them"""

    def __post_init__(self) -> None:
        counts = (self.batch_size, self.sequence_length, self.local_steps)
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise ConfigError(f"Expected batch_size, sequence_length and local_steps >= 1, found {counts}.")
        if self.dtype not in WEIGHT_DTYPES:
            raise ConfigError(f"Expected dtype in {WEIGHT_DTYPES}, found {self.dtype!r}.")
        if self.activation_dtype not in ACTIVATION_DTYPES:
            raise ConfigError(f"Expected activation_dtype in {ACTIVATION_DTYPES}, found {self.activation_dtype!r}.")
