"""How a round's update goes to the clients, as users choose it."""

from dataclasses import dataclass, replace
from typing import Self

from hsplit_flwr.common.checks import require, require_whole

UPDATE_CODECS = ("fp32", "bf16")
DELTA_RANK = 64
"""of all updates together beside a quantised weight, unless users choose another"""


@dataclass(frozen=True)
class UpdateCoding:
    """What `update_rounding` makes of updates. By default nothing: they go out as they are.

    Raises:
        ConfigError: no such codec, or a negative rank.
    """

    codec: str = "fp32"
    """of the factors: fp32 or bf16"""
    rank: int = 0
    """largest rank of a matrix' update; 0: any"""
    total_rank: int = 0
    """largest rank of all updates of a matrix together, where they stand beside a quantised weight; 0: any"""

    def __post_init__(self) -> None:
        require(self.codec in UPDATE_CODECS, "update_codec", f"as one of {UPDATE_CODECS}", self.codec)
        require_whole("update_rank", self.rank, 0)
        require_whole("delta_rank", self.total_rank, 0)

    def merged(self) -> Self:
        """The same where updates go into the weights."""
        return replace(self, total_rank=0)

    @property
    def exact(self) -> bool:
        """Whether updates go out as they are. Only then can a client's own part be left out."""
        return self.codec == UPDATE_CODECS[0] and not self.rank
