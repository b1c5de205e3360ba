"""What heads train on and score."""

from collections.abc import Mapping

from torch import Tensor

Batch = Mapping[str, Tensor]
"""``input_ids``, ``attention_mask`` (1: token, 0: padding) and ``labels`` (-100: no loss), each (B, T)"""


def part_rows(rows: int, parts: int) -> list[slice]:
    """The rows of each micro-batch: `parts` of about equal size, or fewer where there are fewer rows."""
    count = min(rows, parts)
    return [slice(rows * index // count, rows * (index + 1) // count) for index in range(count)]
