"""SplitLoRA, done right and as released, and heads that train nothing, against a training without a split."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.split_plans import plans_of
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.training.config import ClientPlan
from tests.helpers.references import (
    ALGEBRA,
    RATES,
    RELATIVE,
    SPEC,
    Batch,
    adamw,
    client_batches,
    fresh,
    perplexity,
    require_trained_alike,
    token_shares,
    tokens_of,
    with_adapters,
)

CLIENTS = ("0", "1", "2", "3", "4")
RANK = 8
ALPHA = 16.0
"""of adapters of any rank"""
HEAD_SEED = derive_seed(0, "tail", 1)
TAIL_SEED = derive_seed(0, "tail", 1)
Values = dict[str, nn.Parameter]
"""adapters by PEFT's parameter names"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What tells the methods here apart."""

    rank: int = RANK
    stale: bool = False
    joint: bool = False
    passes: int = 1
    frozen_heads: bool = False


class WithoutASplit:
    """PEFT's whole model, called with each client's own head adapters and the one tail's; AdamW for each part."""

    def __init__(self, task: Task, cut: int, way: Way) -> None:
        self.way = way
        tail_names = {name: pair for name, pair in fresh(way.rank, TAIL_SEED).items() if block(name) >= cut}
        head_names = {name: pair for name, pair in fresh(way.rank, HEAD_SEED).items() if block(name) < cut}
        if way.frozen_heads:
            head_names = {}
        self.model, _ = with_adapters({**head_names, **tail_names}, ALPHA)
        adapters = {key: value for key, value in self.model.named_parameters() if value.requires_grad}
        self.tail: Values = {key: value for key, value in adapters.items() if block(module_of(key)) >= cut}
        self.heads: dict[str, Values] = {
            client: {
                key: nn.Parameter(value.detach().clone()) for key, value in adapters.items() if key not in self.tail
            }
            for client in CLIENTS
        }
        self.average: dict[str, Tensor] = {}
        self.task = task
        self.tail_optimizer = adamw(self.tail.values())
        self.head_optimizers = {client: adamw(head.values()) for client, head in self.heads.items() if head}

    def round(self, number: int) -> None:
        """Local steps; then the heads go on from the mean of their adapters, or of what they were one step before."""
        stale = self.way.stale
        batches = {client: client_batches(self.task, client, number) for client in CLIENTS}
        counted = {client: self._copy(client) for client in CLIENTS}
        for step, rate in enumerate(RATES[number - 1]):
            counted = {client: self._copy(client) for client in CLIENTS}
            self._step({client: batches[client][step] for client in CLIENTS}, rate)
        if not stale:
            counted = {client: self._copy(client) for client in CLIENTS}
        shares = dict.fromkeys(CLIENTS, 1 / 6) | {"0": 2 / 6} if stale else token_shares(self.task, CLIENTS, number)
        for key in self.heads["0"]:
            self.average[key] = torch.stack([shares[client] * counted[client][key] for client in CLIENTS]).sum(0)
            for head in self.heads.values():
                head[key].data.copy_(self.average[key])

    def perplexity(self) -> float:
        adapters: dict[str, Tensor] = {**self.heads["0"], **self.tail}
        return perplexity(lambda **batch: functional_call(self.model, adapters, (), batch), self.task)

    def _copy(self, client: str) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.heads[client].items()}

    def _step(self, batches: Mapping[str, Batch], rate: float) -> None:
        """Each head on its own mean loss, the tail on that of one client after another, or on that of all tokens."""
        total = tokens_of(batches.values())
        sent = {client: self._copy(client) for client in CLIENTS}
        self._zero_tail()
        for client, batch in batches.items():
            head = self.heads[client]
            loss = functional_call(self.model, {**head, **self.tail}, (), dict(batch)).loss
            gradients = torch.autograd.grad(loss, [*head.values(), *self.tail.values()])
            for value, gradient in zip(head.values(), gradients[: len(head)], strict=True):
                value.grad = gradient
            for value, gradient in zip(self.tail.values(), gradients[len(head) :], strict=True):
                assert value.grad is not None
                value.grad += tokens_of([batch]) / total * gradient if self.way.joint else gradient
            if head:
                _take_step(self.head_optimizers[client], rate)
            if not self.way.joint:
                _take_step(self.tail_optimizer, rate)
                self._zero_tail()
        if self.way.joint:
            _take_step(self.tail_optimizer, rate)
        for _ in range(self.way.passes - 1):
            self._tail_pass(sent, batches, rate)

    def _tail_pass(self, sent: Mapping[str, dict[str, Tensor]], batches: Mapping[str, Batch], rate: float) -> None:
        """Once more over the batches, with the heads as they were when they sent them."""
        for client, batch in batches.items():
            loss = functional_call(self.model, {**sent[client], **self.tail}, (), dict(batch)).loss
            for value, gradient in zip(
                self.tail.values(), torch.autograd.grad(loss, [*self.tail.values()]), strict=True
            ):
                value.grad = gradient
            _take_step(self.tail_optimizer, rate)

    def _zero_tail(self) -> None:
        for value in self.tail.values():
            value.grad = torch.zeros_like(value)


def _take_step(optimizer: torch.optim.AdamW, rate: float) -> None:
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


def module_of(key: str) -> str:
    return key.removeprefix("base_model.model.").split(".lora_")[0]


def block(module: str) -> int:
    return int(module.split(".")[2])


def cut_of(task: Task, method: str) -> int:
    plan = plans_of(task, METHODS[method]).plans
    assert isinstance(plan, ClientPlan)
    return plan.cut


def require_same_adapters(found: Mapping[str, LoraFactors], expected: Mapping[str, Tensor], rank: int) -> None:
    assert found.keys() == {module_of(key) for key in expected}
    for key, value in expected.items():
        pair = found[module_of(key)]
        tensor = pair.A if ".lora_A." in key else pair.B * (pair.scaling * rank / ALPHA)
        require_trained_alike(key, tensor, value.detach())


@pytest.mark.parametrize(
    ("method", "way", "rounds"),
    [
        ("splitlora", Way(), 2),
        ("splitlora_joint", Way(joint=True), 2),
        ("splitlora_as_released", Way(stale=True), 1),
        ("splitlora_16", Way(rank=16), 2),
        ("splitlora_4_passes", Way(rank=16, passes=4), 2),
        ("frozen_head", Way(rank=16, frozen_heads=True), 2),
        ("frozen_head_4_passes", Way(rank=16, frozen_heads=True, passes=4), 2),
    ],
)
def test_heads_go_on_from_their_mean(method: str, way: Way, rounds: int) -> None:
    """So do the tail and all optimizers, from where they were."""
    exact = replace(METHODS[method], codec="fp32")
    task = Task.of(SPEC, exact)
    trainer = SplitTrainer(task, exact)
    reference = WithoutASplit(task, cut_of(task, method), way)
    for number in range(1, rounds + 1):
        trainer.round(number, CLIENTS)
        reference.round(number)
        require_same_adapters(trainer.server.average, reference.average, way.rank)
        require_same_adapters(trainer.server.tail_rounds.unmerged(), reference.tail, way.rank)
        assert trainer.score().perplexity == pytest.approx(reference.perplexity(), rel=RELATIVE)


def test_as_released_loses_a_single_step() -> None:
    """What is averaged is what the heads started with, though all have moved."""
    exact = replace(METHODS["splitlora_as_released"], codec="fp32")
    trainer = SplitTrainer(Task.of(replace(SPEC, local_steps=1), exact), exact)
    trainer.round(1, CLIENTS)
    assert trainer.server.average
    for name, pair in trainer.server.average.items():
        trained = [head.adapters.factors()[name].B for head in trainer.heads.values()]
        assert len(trained) == 5
        assert all(B.any() for B in trained), name
        assert not pair.B.any(), name
        fresh_A = init_lora_A(RANK, pair.A.shape[1], derive_seed(HEAD_SEED, name))
        assert float((pair.A - fresh_A).abs().max()) < ALGEBRA, name
