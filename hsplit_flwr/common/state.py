"""What the owners of a run's state hand out by `state()` and take back by `load_state(state)`."""

from typing import Any, TypeAlias

State: TypeAlias = dict[str, Any]
"""Plain values by name, which safetensors and JSON hold between them: tensors on the CPU that nobody changes any more,
numbers, texts, lists of numbers or texts, or such a dict again"""
