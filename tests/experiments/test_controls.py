"""The controls differ from HSplitLoRA and SplitLoRA in what their names say, and in nothing else."""

import io
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pytest

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.experiments.methods import METHODS, Method
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.split_plans import plans_of
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.planning.plans import PlansInForce, plans_in_force
from tests.helpers.references import SPEC, Floats, linear_weights

CLIENTS = ("0", "1", "2", "3", "4")
FOUR_PASSES = {"title", "tail_passes"}


def task_of(setting: str) -> Task:
    return Task.of(replace(SPEC, setting=setting, local_steps=8))


def book_of(task: Task, method: str) -> PlansInForce:
    """The plans of the first round."""
    found = plans_of(task, METHODS[method])
    modules = [matrix.name for matrix in task.costs.matrices]
    book = plans_in_force(found.plans, found.tail_lora, found.workload, task.training, modules)
    book.settle(CLIENTS, task.devices)
    return book


def head_ranks(task: Task, book: PlansInForce, client: str) -> dict[str, int]:
    plan = book.plan(client)
    return {m.name: plan.lora.rank(m.name) for m in task.costs.matrices if m.block < plan.cut}


def differences(a: str, b: str) -> set[str]:
    return {f.name for f in fields(Method) if getattr(METHODS[a], f.name) != getattr(METHODS[b], f.name)}


def test_a_control_differs_in_what_its_name_says() -> None:
    assert differences("splitlora", "splitlora_16") == {"title", "largest_rank"}
    assert differences("splitlora_16", "splitlora_4_passes") == FOUR_PASSES
    assert differences("frozen_head", "frozen_head_4_passes") == FOUR_PASSES
    assert differences("hsplitlora", "hsplitlora_4_passes") == FOUR_PASSES
    assert differences("hsplitlora", "frozen_head") == {"title", "planned", "largest_rank", "frozen_heads"}


@pytest.mark.parametrize("setting", ["heterogeneous", "highly_heterogeneous", "homogeneous"])
def test_what_hsplitlora_and_its_controls_train(setting: str) -> None:
    """One block per client, the same tail and scalings. Where devices differ, the smallest has less than rank 16 on one
    matrix by HSplitLoRA's plan; SplitLoRA at rank 16 exceeds its memory by that, and on equal devices is deeper."""
    task = task_of(setting)
    ours, control, frozen = (book_of(task, method) for method in ("hsplitlora", "splitlora_16", "frozen_head"))
    unequal = setting != "homogeneous"
    for client in CLIENTS:
        assert ours.plan(client).cut == frozen.plan(client).cut == 1
        assert control.plan(client).cut == (1 if unequal else 3)
        assert set(head_ranks(task, control, client).values()) == {16}
        assert set(head_ranks(task, frozen, client).values()) == {0}
        expected = [8, 16, 16, 16] if unequal and client == "0" else [16, 16, 16, 16]
        assert sorted(head_ranks(task, ours, client).values()) == expected
    for book in (ours, control, frozen):
        tail = [matrix.name for matrix in task.costs.matrices if matrix.block >= 1]
        assert {(book.tail_lora.rank(name), book.tail_lora.scaling(name)) for name in tail} == {(16, 1.0)}
    needed = task.costs.head_memory(1, head_ranks(task, control, "0")).total_bytes if unequal else 0
    if unequal:
        assert 1.002 < needed / task.devices["0"].memory_bytes < 1.003


def test_splitlora_at_rank_16_counts_the_device_it_does_not_fit() -> None:
    outcome = SplitTrainer(task_of("heterogeneous"), METHODS["splitlora_16"]).round(1, CLIENTS)
    assert outcome.too_large == 1


def test_a_stated_rank_or_cut_goes_before_a_control_s_own() -> None:
    task = Task.of(replace(SPEC, rank=4, cut=2))
    assert book_of(task, "splitlora_16").plan("0").lora.rank("transformer.h.0.mlp.c_fc") == 4
    frozen = book_of(task, "frozen_head")
    assert (frozen.plan("0").cut, frozen.tail_lora.rank("transformer.h.3.mlp.c_fc")) == (2, 4)
    assert not any(head_ranks(task, frozen, "0").values())


def test_frozen_heads_are_as_deep_as_stated_ones() -> None:
    """What deep heads bring is measured beside heads of the same depth that train nothing."""
    task = task_of("deep_heads")
    ours, frozen = book_of(task, "hsplitlora"), book_of(task, "frozen_head")
    assert [frozen.plan(client).cut for client in CLIENTS] == [ours.plan(client).cut for client in CLIENTS]
    assert {rank for client in CLIENTS for rank in head_ranks(task, frozen, client).values()} == {0}


def importance_bytes(matrices: int) -> int:
    """The array that a client returns beside its factors, as NumPy saves it."""
    file = io.BytesIO()
    np.save(file, np.zeros(matrices, np.float32))
    return len(file.getvalue())


def test_a_frozen_head_trains_and_sends_nothing() -> None:
    """No adapters go up, no weights come down, nothing is computed backward.

    Steps travel as those of HSplitLoRA, but gradients come down for one of them only, on which importance is measured.
    """
    frozen, ours = (SplitTrainer(Task.of(SPEC), METHODS[method]) for method in ("frozen_head", "hsplitlora"))
    before = weights_of(frozen)
    for number in (1, 2):
        outcome, other = frozen.round(number, CLIENTS), ours.round(number, CLIENTS)
        assert outcome.tokens == other.tokens
        assert (outcome.too_large, outcome.server_flops) == (0, 0.0)
        for work, trained in zip(outcome.work, other.work, strict=True):
            assert work.upload_bytes == importance_bytes(matrices=4)
            assert work.download_bytes == 0
            assert work.backward_flops == 0 < trained.backward_flops
            assert work.forward_flops == trained.forward_flops
            assert work.step_bytes_up == trained.step_bytes_up
            empty, steps = frame_bytes.hello_bytes(), work.steps
            assert work.step_bytes_down < empty + 1.5 / steps * (trained.step_bytes_down - empty)
            assert work.step_bytes_down > empty + 0.5 / steps * (trained.step_bytes_down - empty)
            assert work.tail_flops == trained.tail_flops
    adapted = names_of_adapters(frozen)
    assert adapted == {name for name in before if int(name.split(".")[2]) >= 1}
    after = weights_of(frozen)
    assert all(np.array_equal(after[name], weight) for name, weight in before.items())


def weights_of(trainer: SplitTrainer) -> dict[str, Floats]:
    """Frozen weights by module, whether or not it has an adapter."""
    return {name.replace(".base_layer", ""): w for name, w in linear_weights(trainer.global_model()).items()}


def names_of_adapters(trainer: SplitTrainer) -> set[str]:
    names: Mapping[str, object] = dict(trainer.global_model().named_parameters())
    return {name.split(".lora_A")[0] for name in names if ".lora_A" in name}
