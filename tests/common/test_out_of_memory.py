"""What says that memory is out, by errors that Python and torch really raise."""

import pytest
import torch

from hsplit_flwr.common.out_of_memory import is_out_of_memory


def test_errors_of_python_and_torch() -> None:
    for beyond_any_machine in (lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as found:
            beyond_any_machine()
        assert is_out_of_memory(found.value)
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) + torch.zeros(3)
    assert not is_out_of_memory(other.value)
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
