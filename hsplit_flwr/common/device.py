"""Where a process computes, in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def describe_device(device: "torch.device | str") -> str:
    """``"CPU, 2 threads"``, ``"GPU cuda:0, NVIDIA H100 80GB HBM3, 79 GB"``; another accelerator by its torch name."""
    import torch

    found = torch.device(device)
    if found.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'' if threads == 1 else 's'}"
    if found.type != "cuda":
        return f"GPU {found}"
    index = torch.cuda.current_device() if found.index is None else found.index
    properties = torch.cuda.get_device_properties(index)
    return f"GPU cuda:{index}, {properties.name}, {properties.total_memory / 1e9:.0f} GB"
