"""The settings: what they state for LLaMA-2-7B, how they scale, and that every client has something to hold."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from statistics import fmean
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig

from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.settings import LLAMA_2_7B, SETTINGS, Setting, Size, round_weight
from hsplit_flwr.experiments.split_plans import planner_config
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.clock import ClientWork, play_round
from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
from hsplit_flwr.planning.planner import PlannerConfig, plan
from hsplit_flwr.planning.round_plan import RoundPlan
from tests.helpers.updates import largest_update

SIZE_TOLERANCE = 0.01
"""relative; memory depends a little on how the installed torch and transformers compute"""
WHOLE_BYTES = 1e-6
"""relative; memory is cut to whole bytes"""
PLANNER_TOLERANCE = 0.01
"""relative; the planner's bounds on adapters and tail are above the clock's round, never below"""
ROUND_TOLERANCE = 0.03
"""relative; headers of arrays and frames"""
IDS = ("0", "1", "2", "3", "4")
FIVE_KINDS = ("homogeneous", "heterogeneous", "highly_heterogeneous", "deep_heads", "small_server")
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
five_kinds = pytest.mark.parametrize("setting", [SETTINGS[name] for name in FIVE_KINDS], ids=FIVE_KINDS)


def smollm2_config() -> PretrainedConfig:
    """SmolLM2-135M's (https://huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json)."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


WIRE: dict[str, Any] = {"activation_codec": "bf16", "gradient_codec": "bf16"}


@cache
def costs_of(model: str, batch: int = RunSpec.batch_size, length: int = RunSpec.max_length) -> ModelCosts:
    if model == "7b":
        return ModelCosts(LlamaConfig(), Workload(4, 128, dtype="bf16", **WIRE))
    tiny = ModelFiles.resolve(str(tiny_checkpoint())).config if model == "tiny" else None
    return ModelCosts(tiny or smollm2_config(), Workload(batch, length, RunSpec.local_steps, **WIRE))


def planned(costs: ModelCosts, devices: dict[str, Budget], server: Budget) -> RoundPlan:
    importance = {matrix.name: 1.0 for matrix in costs.matrices}
    return plan(costs, importance, devices, server, PlannerConfig(tail_worth=0.0, deadline_s=math.inf))


def spread(setting: Setting, field: Callable[[Budget], float]) -> float:
    values = [field(budget) for budget in setting.clients.values()]
    assert values == sorted(values)
    return values[-1] / values[0]


def test_the_reference_is_llama_2_7b() -> None:
    config = LlamaConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 11008)
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (32000, 32, 32)
    assert vars(Size.of(costs_of("7b"))) == pytest.approx(vars(LLAMA_2_7B), rel=SIZE_TOLERANCE)
    # 2 FLOPs forward and 2 backward per weight of the blocks and the LM head and token, attention and adapters beside
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    assert 1.0 < LLAMA_2_7B.step_flops / (4 * weights * 4 * 128) < 1.05
    assert 4 * 128 * 4096 * 2 < LLAMA_2_7B.step_bytes_up < 1.01 * 4 * 128 * 4096 * 2


def test_the_settings_of_the_issue() -> None:
    assert list(SETTINGS)[:3] == ["homogeneous", "heterogeneous", "highly_heterogeneous"]
    alike, unequal, extreme = list(SETTINGS.values())[:3]
    assert len(set(alike.clients.values())) == 1
    for setting, compute, link in ((alike, 1, 1), (unequal, 4, 1), (extreme, 16, 16)):
        assert tuple(setting.clients) == tuple(setting.ranks) == IDS
        assert spread(setting, lambda budget: budget.flops_per_s) == pytest.approx(compute)
        assert spread(setting, lambda budget: budget.uplink_bytes_per_s) == pytest.approx(link)
        assert spread(setting, lambda budget: budget.downlink_bytes_per_s) == pytest.approx(link)
        assert setting.clients["2"] == alike.clients["2"]
    for setting in (unequal, extreme):
        assert [budget.memory_bytes / 1e9 for budget in setting.clients.values()] == [5, 8, 12, 16, 20]
        assert tuple(setting.ranks.values()) == (2, 4, 8, 12, 16)
    assert set(alike.ranks.values()) == {8}
    assert [setting.away for setting in (alike, unequal, extreme)] == [0, 0, 0.3]


def test_deep_heads_have_stated_cuts_on_the_unequal_devices() -> None:
    deep = SETTINGS["deep_heads"]
    assert replace(deep, cut_eighths=None) == SETTINGS["heterogeneous"]
    assert list(deep.cuts(8).values()) == [1, 3, 4, 6, 7]
    assert list(deep.cuts(30).values()) == [4, 11, 15, 22, 26]
    assert list(deep.cuts(2).values()) == [1, 1, 1, 1, 1]
    assert not SETTINGS["heterogeneous"].cuts(8)


@each_setting
def test_llama_2_7b_gets_what_is_stated(setting: Setting) -> None:
    for client, device in setting.devices(costs_of("7b")).items():
        assert vars(device) == pytest.approx(vars(setting.clients[client]), rel=SIZE_TOLERANCE)


@each_setting
@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_seconds_and_shares_are_those_of_llama_2_7b(setting: Setting, model: str) -> None:
    costs = costs_of(model)
    deepest, ranks = costs.num_blocks - 1, {matrix.name: 16 for matrix in costs.matrices}
    step_flops = costs.head_flops(deepest, ranks) + costs.tail_flops(deepest, ranks)
    devices = {**setting.devices(costs), "server": setting.server(costs)}
    stated = {**setting.clients, "server": setting.server(costs_of("7b"))}
    for who, device in devices.items():
        if who == "server" or not setting.filled_at:
            share = costs.head_memory(deepest, ranks).total_bytes / device.memory_bytes
            assert share == pytest.approx(LLAMA_2_7B.head_bytes / stated[who].memory_bytes, rel=SIZE_TOLERANCE)
        seconds = step_flops / device.flops_per_s
        assert seconds == pytest.approx(LLAMA_2_7B.step_flops / stated[who].flops_per_s, rel=SIZE_TOLERANCE)
        sending = costs.step_bytes_up / device.uplink_bytes_per_s
        assert sending == pytest.approx(LLAMA_2_7B.step_bytes_up / stated[who].uplink_bytes_per_s, rel=SIZE_TOLERANCE)
        assert device.latency_s == stated[who].latency_s


@each_setting
@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_a_device_is_the_same_for_every_method(setting: Setting, model: str) -> None:
    """It was scaled by a method's own batches: who sent four parts had less memory, as their heads keep less."""
    costs = costs_of(model)
    parts: dict[str, Any] = {"activation_codec": "int8", "gradient_codec": "int8"}
    parts |= {"micro_batches": 4, "micro_batches_in_flight": 3}
    pipelined = costs.under(replace(costs.workload, micro_steps=True, **parts))
    assert setting.devices(pipelined) == setting.devices(costs)
    assert setting.server(pipelined) == setting.server(costs)


# ---------------------------------------------------------------------------------------- what a round transfers


def test_a_blocks_adapters_and_their_update_in_llama_2_7b() -> None:
    """5 MB go up, and 25 MB come down of five clients' and the tail's: 1.2 and 6 steps' activations."""
    costs = costs_of("7b")
    ranks = {matrix.name: 16 for matrix in costs.matrices if matrix.block < 1}
    up = costs.update_bytes(1, ranks)
    down = costs.delta_bytes(1, UpdateCoding(), dict.fromkeys(ranks, 96), 16)
    assert up / 1e6 == pytest.approx(5.0, abs=0.05)
    assert down / 1e6 == pytest.approx(25.0, abs=0.1)
    assert round_weight(costs) == pytest.approx(1.0, rel=SIZE_TOLERANCE)


@pytest.mark.parametrize(("model", "share", "weight"), [("tiny", 1 / 4, 3.7), ("smollm2", 1 / 5, 0.87)])
def test_a_rounds_transfers_weigh_as_in_llama_2_7b(model: str, share: float, weight: float) -> None:
    """Against a step's activations, of a head of the same share of the blocks; the embedded model's counted 0.27."""
    costs, reference = costs_of(model), costs_of("7b")
    assert round_weight(costs) == pytest.approx(weight, abs=0.01)

    def steps_worth(of: ModelCosts, coding: UpdateCoding, clients: int) -> tuple[float, float]:
        """Of a share of the blocks: uploads and downloads in steps' activations, all at rank 16."""
        deep = round(share * of.num_blocks)
        part = share * of.num_blocks / deep  # of LLaMA-2-7B a fifth is no whole number of blocks
        ranks = {matrix.name: 16 for matrix in of.matrices if matrix.block < deep}
        down = of.delta_bytes(deep, coding, dict.fromkeys(ranks, 16 * (clients + 1)), 16)
        counted = round_weight(of) * part / of.step_bytes_up
        return counted * of.update_bytes(deep, ranks), counted * down

    small = UpdateCoding("bf16", 16)
    for coding, clients in ((UpdateCoding(), 1), (small, 5), (small, 50)):
        found, expected = steps_worth(costs, coding, clients), steps_worth(reference, coding, clients)
        assert found == pytest.approx(expected, rel=ROUND_TOLERANCE)
    if model == "tiny":  # a matrix travels whole where that is less: as the settings say
        for clients, of in ((5, 0.9), (20, 0.225), (50, 0.09)):
            down, whole = (steps_worth(c, UpdateCoding(), clients)[1] for c in (costs, reference))
            assert down / whole == pytest.approx(of, rel=ROUND_TOLERANCE)


# ---------------------------------------------------------------------------------------- who holds what


def test_the_settings_beside_the_first_ones() -> None:
    heterogeneous, small = SETTINGS["heterogeneous"], SETTINGS["small_server"]
    assert replace(small, server_device=heterogeneous.server_device) == heterogeneous
    assert small.server_device.memory_bytes == 22e9
    assert small.server_device.flops_per_s == pytest.approx(66e12, rel=0.01)
    for name, count in (("many_clients", 50), ("twenty_clients", 20)):
        many = SETTINGS[name]
        assert list(many.clients) == list(many.ranks) == list(map(str, range(count)))
        assert set(Counter(many.clients.values()).values()) == {count / 5}
        assert set(many.clients.values()) == set(heterogeneous.clients.values())
        assert {many.ranks[c] for c, device in many.clients.items() if device == many.clients["4"]} == {16}
        assert many.server_device == heterogeneous.server_device
    floor = SETTINGS["privacy_floor"]
    assert [floor.min_cut(blocks) for blocks in (32, 8, 30, 2)] == [8, 2, 8, 1]
    assert heterogeneous.min_cut(32) == 1
    phone = SETTINGS["phones"].clients["0"]
    assert phone.flops_per_s == 0.3e12
    assert phone.uplink_bytes_per_s * 8 / 1e6 == pytest.approx(12.61)
    assert phone.downlink_bytes_per_s * 8 / 1e6 == pytest.approx(56.74)
    assert phone.latency_s > SETTINGS["homogeneous"].clients["0"].latency_s


@each_setting
@pytest.mark.parametrize("model", ["7b", "tiny", "smollm2"])
def test_nobody_is_left_out_above_the_floor(setting: Setting, model: str) -> None:
    """By the plan that the experiments make, with the server's memory as it is."""
    costs = costs_of(model)
    config = planner_config(METHODS["hsplitlora"], setting.min_cut(costs.num_blocks), round_weight(costs))
    importance = {matrix.name: 1.0 for matrix in costs.matrices}
    found = plan(costs, importance, setting.devices(costs), setting.server(costs), config)
    assert not found.left_out
    assert len(found.clients) == len(setting.clients)
    assert min(client.cut for client in found.clients.values()) >= setting.min_cut(costs.num_blocks)


@pytest.mark.parametrize("model", ["7b", "tiny", "smollm2"])
def test_memory_is_tight_inside_a_head(model: str) -> None:
    """Each device holds the floor's head at its rank everywhere, and not at the next one: on any model."""
    costs, setting = costs_of(model), SETTINGS["tight_memory"]
    cut, devices = setting.min_cut(costs.num_blocks), setting.devices(costs)

    def needed(rank: int) -> int:
        ranks = {matrix.name: rank for matrix in costs.matrices if matrix.block < cut}
        return costs.head_memory(cut, ranks).total_bytes

    assert setting.filled_at
    for client, rank in setting.filled_at.items():
        assert needed(rank) <= devices[client].memory_bytes < needed(rank + 1)
    assert needed(16) / needed(1) < 1.05  # that is all that ranks take beside frozen weights


@five_kinds
@pytest.mark.parametrize("model", ["7b", "tiny", "smollm2"])
def test_every_client_can_hold_a_head(setting: Setting, model: str) -> None:
    costs = costs_of(model)
    found = planned(costs, setting.devices(costs), setting.server(costs))
    assert not found.left_out
    cuts = [found.clients[client].cut for client in IDS]
    ranks = [fmean(found.clients[client].ranks.values()) for client in IDS]
    assert min(ranks) > 8
    if len(set(setting.clients.values())) == 1:
        assert costs.num_blocks / 2 <= min(cuts) == max(cuts) < costs.num_blocks - 1
    else:
        assert cuts == sorted(set(cuts))  # five different cuts, deeper with the device
        assert cuts[0] <= costs.num_blocks / 4
        assert cuts[-1] == costs.num_blocks - 1


@pytest.mark.parametrize(("batch", "length"), [(4, 48), (16, 128)])
@pytest.mark.parametrize("model", ["tiny", "smollm2"])
def test_other_batches_fit_too(model: str, batch: int, length: int) -> None:
    costs = costs_of(model, batch, length)
    setting = SETTINGS["heterogeneous"]
    found = planned(costs, setting.devices(costs), setting.server(costs))
    assert not found.left_out
    # whatever the cuts are: with the shallowest ones the tail has the most to hold
    tail = costs.tail_memory([1] * len(IDS), {matrix.name: 16 for matrix in costs.matrices})
    assert tail.total_bytes < setting.server(costs).memory_bytes


@pytest.mark.parametrize("client", IDS)
def test_the_clock_and_the_planner_agree_on_one_client(client: str) -> None:
    costs, setting = costs_of("tiny"), SETTINGS["highly_heterogeneous"]
    device, server = setting.devices(costs)[client], setting.server(costs)
    found = planned(costs, {client: device}, server)
    head = found.clients[client]
    work = ClientWork(
        client,
        steps=costs.workload.local_steps,
        forward_flops=0.3 * costs.head_flops(head.cut, head.ranks),
        backward_flops=0.7 * costs.head_flops(head.cut, head.ranks),
        step_bytes_up=costs.step_bytes_up,
        step_bytes_down=costs.step_bytes_down,
        tail_flops=costs.tail_flops(head.cut, found.tail.ranks),
        download_bytes=largest_update(costs, head.cut, 1, found.tail.ranks),
        upload_bytes=costs.update_bytes(head.cut, head.ranks) + costs.hello_bytes,
    )
    played = play_round([work], {client: device}, server)
    # the planner leaves the latency of download and upload out
    seconds = played.duration_s - 2 * device.latency_s
    assert seconds * (1 - 1e-9) <= head.round_s <= seconds * (1 + PLANNER_TOLERANCE)


def test_who_is_there() -> None:
    setting, rounds = SETTINGS["highly_heterogeneous"], range(1, 1001)
    present = [setting.present(seed=3, round_number=number) for number in rounds]
    assert present == [setting.present(3, number) for number in rounds]
    assert present != [setting.present(4, number) for number in rounds]
    assert all(there and list(there) == sorted(there) for there in present)
    counts = Counter(client for there in present for client in there)
    for client in IDS:  # 700 expected, standard deviation sqrt(1000 * 0.7 * 0.3) = 14.5
        assert abs(counts[client] - 700) < 4 * 14.5
    both = sum({"0", "1"} <= set(there) for there in present)
    assert abs(both - 490) < 4 * 15.8  # independent of each other: 0.49, sqrt(1000 * 0.49 * 0.51) = 15.8


def test_everybody_is_there_where_nobody_leaves_and_never_nobody() -> None:
    for name in ("homogeneous", "heterogeneous"):
        assert all(SETTINGS[name].present(0, number) == IDS for number in range(1, 20))
    always_away = replace(SETTINGS["highly_heterogeneous"], away=1.0)
    alone = [always_away.present(0, number) for number in range(1, 200)]
    assert {len(there) for there in alone} == {1}
    assert {there[0] for there in alone} == set(IDS)


def test_a_round_takes_a_fraction_of_many_clients() -> None:
    """FlowerTune's way of working: 20 clients, of whom 4 take part in a round, drawn anew."""
    setting = SETTINGS["flowertune"]
    assert len(setting.clients) == len(setting.ranks) == 20
    present = [setting.present(0, number) for number in range(1, 501)]
    assert {len(there) for there in present} == {4}
    assert all(list(there) == sorted(there, key=int) for there in present)
    counts = Counter(client for there in present for client in there)
    for client in setting.clients:  # 100 expected, standard deviation sqrt(500 * 0.2 * 0.8) = 8.9
        assert abs(counts[client] - 100) < 4 * 8.9
    assert len(replace(setting, fraction=0.01).present(0, 1)) == 1
