"""Runs of the comparison on a GPU end where those on the CPU do. Where there is no GPU: skipped."""

import pytest
import torch

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.engine import run
from hsplit_flwr.experiments.records import RunSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees")
pytestmark = pytest.mark.timeout(300)
SAME = 0.01
"""relative, of perplexities after eight steps"""
METHODS = [
    *("hsplitlora", "hsplitlora_all", "hsplitlora_keep_pipelined", "frozen_head_pipelined", "splitlora_16_pipelined"),
    *("hetlora", "flora", "fedex_lora", "ft", "one_model", "cenlora_small_batch"),
]


@needs_gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_gpu_ends_where_one_on_the_cpu_does(method: str) -> None:
    spec = RunSpec(method, "heterogeneous", "dirichlet", 0, 2e-3, rounds=2, local_steps=4, eval_examples=40)
    found, expected = run(spec, device="cuda"), run(spec)
    assert torch.cuda.max_memory_allocated() > 0
    for got, due in zip(found.evaluations, expected.evaluations, strict=True):
        assert got.perplexity == pytest.approx(due.perplexity, rel=SAME)
        assert got.virtual_s == due.virtual_s


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="Expected a GPU that torch sees, found none"):
        run(RunSpec("hsplitlora", "heterogeneous", "iid", 0, 1e-3), device="cuda")
