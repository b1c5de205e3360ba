"""Plans of a base in 4 or 8 bits: predicted bytes against those of real segments; what a budget affords of it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hsplit_flwr.cli import main
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.merge import merge_beneath, merge_delta
from hsplit_flwr.lora.places import ScratchFolder
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import QuantizedLayer
from hsplit_flwr.models.segments import Segment, linear_shapes, load_segment
from hsplit_flwr.planning.costs.delta_costs import DeltaCosts
from hsplit_flwr.planning.costs.memory import MemoryEstimate
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import saved_llama

PER_CENT = 0.01
WIDTH = 128
WORKLOAD = Workload(2, 16)
RANK = 4
WIDE = LlamaConfig(vocab_size=97, num_hidden_layers=4, hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
METHOD = pytest.mark.parametrize("method", ["nf4", "int8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("llama"), WIDTH, 256)


def held_bytes(segment: Segment) -> int:
    """All tensors of a segment's weights, by bitsandbytes' own attributes."""
    tensors = [*segment.parameters(), *segment.buffers()]
    for layer in segment.model.modules():
        if isinstance(layer, QuantizedLayer):
            own: Any = layer
            quant_state = getattr(own.weight, "quant_state", None)
            tensors += [quant_state.absmax] if quant_state else [own.state.SCB]
            tensors += layer.beside
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@METHOD
def test_weights_and_what_stands_beside_them_take_the_bytes_that_were_predicted(method: str, folder: Path) -> None:
    files = ModelFiles.resolve(str(folder)).quantized_by(method)
    predicted = ModelCosts(files.config, replace(WORKLOAD, quantization=method, delta_rank=RANK))
    for cut in (1, 3):
        head = load_segment(files, 0, cut)
        for layer in head.linear_modules().values():
            assert isinstance(layer, QuantizedLayer)
            layer.stand(torch.zeros(RANK, layer.in_features), torch.zeros(layer.out_features, RANK))
        assert held_bytes(head) == pytest.approx(predicted.head_memory(cut, {}).weights, rel=PER_CENT)
    beside = sum(4 * RANK * matrix.sides for matrix in predicted.matrices)
    whole = held_bytes(load_segment(files)) + beside
    assert whole == pytest.approx(predicted.tail_memory([1], {}).weights, rel=PER_CENT)


@METHOD
def test_an_adapter_that_is_kept_takes_room_beside_its_matrix(method: str, folder: Path) -> None:
    """It is part of the delta, whose rank is bounded, and what stands beside the weight lacks it: two pairs more."""
    files = ModelFiles.resolve(str(folder)).quantized_by(method)
    work = replace(WORKLOAD, quantization=method, delta_rank=RANK)
    restarts, keeps = (ModelCosts(files.config, w) for w in (work, replace(work, keep_adapters=True)))
    head = load_segment(files, 0, 2)
    adapters = SegmentAdapters(head, LoraSpec(RANK))
    ranks, start = dict.fromkeys(adapters.module_names, RANK), adapters.factors()
    delta = WeightDelta()
    delta.add(start)
    merge_delta(head, files, delta, start)
    before = held_bytes(head)
    merge_beneath(head, files, delta, start, start)
    found = held_bytes(head) - before + sum(pair.A.nbytes + pair.B.nbytes for pair in start.values())

    def more(estimate: Callable[[ModelCosts], MemoryEstimate]) -> int:
        return estimate(keeps).total_bytes - estimate(restarts).total_bytes

    assert more(lambda costs: costs.head_memory(2, ranks)) == found
    assert more(lambda costs: costs.tail_memory([1, 2], ranks)) == found
    assert more(lambda costs: costs.tail_memory([1], ranks)) == found / 2  # the tail alone has the second block
    plain = ModelCosts(files.config, replace(WORKLOAD, keep_adapters=True))
    of_plain = plain.head_memory(2, ranks).adapters - restarts.head_memory(2, ranks).adapters
    assert of_plain == found / 2  # no more than what the round started from


@METHOD
def test_a_quantised_head_costs_its_share_and_as_many_flops(method: str) -> None:
    plain = ModelCosts(WIDE, replace(WORKLOAD, dtype="bf16"))
    costs = ModelCosts(WIDE, replace(WORKLOAD, dtype="bf16", quantization=method))

    def block(of: ModelCosts) -> int:
        return of.head_memory(2, {}).weights - of.head_memory(1, {}).weights

    share = {"nf4": 0.281, "int8": 0.501}[method]
    beside = sum(4 * 64 * matrix.sides for matrix in costs.matrices if matrix.block == 1)
    assert block(costs) - beside == pytest.approx(share * block(plain), rel=PER_CENT)
    assert costs.head_flops(2, {}) == plain.head_flops(2, {})
    assert costs.head_memory(2, {}).workspace > plain.head_memory(2, {}).workspace  # a weight is dequantised


def test_the_deltas_files_take_what_was_predicted(folder: Path, tmp_path: Path) -> None:
    """As long as the updates fit, and after: then one pair of factors a matrix, and at the server what they lack."""
    model = GlobalModel(ModelFiles.resolve(str(folder)).quantized_by("nf4"))
    model.keep_delta_in(ScratchFolder(tmp_path))
    model.send_updates_by(UpdateCoding(total_rank=3 * RANK))
    costs = ModelCosts(model.files.config, replace(WORKLOAD, quantization="nf4", delta_rank=3 * RANK))
    shapes = linear_shapes(model.segment)
    ranks = dict.fromkeys(shapes, RANK)
    for number in range(1, 6):
        generator = torch.Generator().manual_seed(number)
        model.apply_update(
            {
                name: LoraFactors(
                    torch.randn(RANK, d_in, generator=generator), torch.randn(d_out, RANK, generator=generator), 1.0
                )
                for name, (d_out, d_in) in shapes.items()
            },
            {},
        )
        found = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
        assert found == pytest.approx(costs.deltas.server_disk(ranks, {}, number).delta, rel=PER_CENT), number
        assert (model.delta_error == 0) == (number <= 3)
    head = costs.deltas.client_disk(2, ranks, {}, 5)
    assert head.delta < costs.deltas.client_disk(2, ranks, {}, 3).delta * 1.1
    unbounded = DeltaCosts(costs.matrices, 4)
    assert unbounded.client_disk(2, ranks, {}, 5).delta > 1.4 * head.delta
    _, whole, tensors = model.since(4, 2)
    frames = costs.delta_bytes(2, UpdateCoding(total_rank=3 * RANK), ranks, RANK)
    assert not whole
    assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(frames, rel=0.05)


def test_a_budget_affords_more_blocks_in_4_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, on a device that has room for two blocks and a half in bf16."""
    WIDE.save_pretrained(tmp_path)
    work = Workload(2, 16, dtype="bf16")
    fits, does_not = (ModelCosts(WIDE, work).head_base_bytes(cut) for cut in (2, 3))
    profiles = tmp_path / "devices.toml"
    client = f'[[client]]\ndevice = "workstation"\nmemory_mb = {(fits + does_not) / 2e6:.1f}\n'
    profiles.write_text(f'[server]\ndevice = "workstation"\n\n{client}')
    options = ["plan", "--model", str(tmp_path), "--profiles", str(profiles), "--batch-size", "2", "--tail-worth", "0"]
    options += [
        "--sequence-length",
        "16",
        "--dtype",
        "bf16",
        "--delta-rank",
        "16",
        "--ranks",
        "4",
        "--deadline-s",
        "inf",
    ]
    cuts, told = {}, {}
    for method in ("none", "nf4"):
        assert main([*options, "--quantization", method]) == 0
        told[method] = capsys.readouterr().out
        cuts[method] = re.findall(r"^ +0 +(\d+) ", told[method], re.MULTILINE)[0]
    assert (cuts["none"], cuts["nf4"]) == ("2", "3")
    assert "nf4, computing in bf16" in told["nf4"]
    assert "nf4" not in told["none"]


def test_a_quantised_checkpoint_is_planned_as_it_is(folder: Path) -> None:
    config = ModelFiles.resolve(str(folder)).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    chosen = replace(WORKLOAD, quantization="nf4")
    plain = ModelCosts(ModelFiles.resolve(str(folder)).config, chosen)
    assert ModelCosts(config, chosen).head_memory(2, {}) == plain.head_memory(2, {})
    with pytest.raises(ConfigError, match=r'Set quantization = "nf4"'):
        ModelCosts(config, replace(WORKLOAD, quantization="int8"))
