"""What a round makes a client do: bytes of the real frames, compute with padding."""

import pytest
import torch

from hsplit_flwr.exchange.batches import batch_tensors, gradient_tensors
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.positions import BatchForm, traveling
from hsplit_flwr.experiments.work import recorded, split_work
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import random_batches
from tests.helpers.models import HIDDEN_SIZE, tiny_config


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_step_takes_the_bytes_of_its_real_positions_and_the_compute_of_all(codec: str) -> None:
    workload = Workload(2, 10, activation_codec=codec, gradient_codec=codec)
    costs = ModelCosts(tiny_config("gpt2", True), workload)
    batches = random_batches(3, seed=0)
    batches[1] = {name: tensor[:1] for name, tensor in batches[1].items()}  # the last one of an epoch, say
    forms: list[list[BatchForm]] = []
    assert list(recorded(batches, forms)) == batches
    ranks = {costs.matrices[0].name: 2}
    work = split_work("a", costs, 2, ranks, {}, forms, download_bytes=0, upload_bytes=0)
    idle = split_work("a", costs, 2, dict.fromkeys(ranks, 0), {}, forms, download_bytes=0, upload_bytes=0)
    up, down, down_idle = 0, 0, 0
    for batch in batches:
        mask, labels = batch["attention_mask"], batch["labels"]
        values = torch.randn(*mask.shape, HIDDEN_SIZE)
        up += len(encode(Header("train", "r", 1, "a", 2), batch_tensors(values, mask, labels, CODECS[codec])))
        gradient = gradient_tensors(values, traveling(mask, labels), CODECS[codec])
        down += len(encode(Header("gradient", "r", 1, "a", 2), gradient))
        measured = batch is batches[0]
        down_idle += len(encode(Header("gradient", "r", 1, "a", 2), gradient if measured else {}))
    assert work.step_bytes_up == pytest.approx(up / 3)
    assert work.step_bytes_down == pytest.approx(down / 3)
    assert idle.step_bytes_up == work.step_bytes_up
    assert idle.step_bytes_down == pytest.approx(down_idle / 3)
    assert work.step_bytes_up < costs.step_bytes_up
    assert work.forward_flops == pytest.approx(5 / 6 * costs.head_flops(2, {}))
