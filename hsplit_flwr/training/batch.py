"""What heads train on and score."""

from collections.abc import Mapping

from torch import Tensor

Batch = Mapping[str, Tensor]
"""``input_ids``, ``attention_mask`` (1: token, 0: padding) and ``labels`` (-100: no loss), each (B, T)"""
