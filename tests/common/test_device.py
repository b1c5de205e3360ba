from types import SimpleNamespace

import pytest
import torch

from hsplit_flwr.common.device import describe_device


def test_a_cpu_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, text in ((1, "CPU, 1 thread"), (2, "CPU, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert describe_device("cpu") == describe_device(torch.device("cpu")) == text


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_a_name_and_memory(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "first", 1: "second"}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(name=names[number], total_memory=79_200_000_000),
    )
    assert describe_device(device) == f"GPU cuda:{index}, {names[index]}, 79 GB"


def test_another_accelerator_has_the_name_torch_gives_it() -> None:
    assert describe_device("mps") == "GPU mps"
