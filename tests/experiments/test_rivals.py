"""Rivals that train the whole model, against their rules stated with transformers, PEFT, torch's AdamW and NumPy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.experiments.engine import run
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.rivals import pruning, whole_model
from hsplit_flwr.experiments.rivals.full_model import FullTrainer
from hsplit_flwr.experiments.rivals.one_model import OneModelTrainer
from hsplit_flwr.experiments.rivals.pruning import penalty, ranks_after
from hsplit_flwr.experiments.rivals.server_model import ServerTrainer
from hsplit_flwr.experiments.rivals.whole_model import WholeTrainer
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.lora.aggregation import Contribution
from hsplit_flwr.lora.factors import LoraFactors
from tests.helpers.references import (
    ALGEBRA,
    RATES,
    RELATIVE,
    SCALING,
    SPEC,
    TRAINED,
    Batch,
    Floats,
    Pair,
    adamw,
    client_batches,
    difference,
    flat,
    fresh,
    linear_weights,
    load_reference,
    perplexity,
    require_trained_alike,
    token_shares,
    tokens_of,
    train,
    with_adapters,
)

RANKS = {"0": 2, "2": 8, "4": 16}
"""of the clients that take part here, by the setting"""


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.of(SPEC)


def dense(A: Any, B: Any, scaling: float = SCALING) -> Floats:
    product: Floats = scaling * (np.asarray(B, np.float64) @ np.asarray(A, np.float64))
    return product


@pytest.mark.parametrize("method", ["cenlora", "cenlora_small_batch"])
def test_cenlora_is_one_peft_training_on_everybodys_batches(task: Task, method: str) -> None:
    trainer = ServerTrainer(task, METHODS[method])
    model, pairs = with_adapters(fresh(16, derive_seed(0, "tail")))
    optimizer = adamw(flat(pairs))
    warm_up = [4e-3 * (step + 1) / 10 for step in range(10)]
    small_rates = [*warm_up, *(4e-3 * (1 - step / 10) for step in range(10))]
    for number in (1, 2):
        joint = list(zip(*(client_batches(task, client, number) for client in "01234"), strict=True))
        steps = joint if method == "cenlora" else [[batch] for batches in joint for batch in batches]
        rates = RATES[number - 1] if method == "cenlora" else small_rates[10 * (number - 1) : 10 * number]
        outcome = trainer.round(number, ("1",))  # the server has the data of those who are away, too
        losses = train(model, optimizer, steps, rates)
        assert outcome.train_loss == pytest.approx(fmean(losses), rel=RELATIVE)
        assert outcome.tokens == tokens_of(batch for batches in joint for batch in batches)
        assert trainer.score().perplexity == pytest.approx(perplexity(model, task), rel=RELATIVE)
    found = trainer._adapters.factors()
    assert found.keys() == pairs.keys()
    for name, (A, B) in pairs.items():
        require_trained_alike(name, found[name].A, A.detach())
        require_trained_alike(name, found[name].B, B.detach())


def step_of_one_model(
    model: Any, shared: torch.optim.AdamW, alone: torch.optim.AdamW, batches: Sequence[Batch], rate: float
) -> None:
    """A step of `alone` on each batch, and one of `shared` on the mean of their gradients by tokens."""
    factors = shared.param_groups[0]["params"]
    means = [torch.zeros_like(factor) for factor in factors]
    for batch in batches:
        model.zero_grad()
        train(model, alone, [[batch]], [rate])
        for mean, factor in zip(means, factors, strict=True):
            mean += factor.grad * (tokens_of([batch]) / tokens_of(batches))
    for mean, factor in zip(means, factors, strict=True):
        factor.grad = mean
    torch.nn.utils.clip_grad_norm_(factors, 1.0)
    shared.param_groups[0]["lr"] = rate
    shared.step()


def first_three_rows(batch: Batch) -> Batch:
    """What may be left at the end of an epoch: fewer rows than parts."""
    return {key: value[:3] for key, value in batch.items()}


@pytest.mark.parametrize("cut", [1, 4, 7])
@pytest.mark.parametrize("parts", [1, 4])
def test_one_model_at_every_step(cut: int, parts: int) -> None:
    """Blocks before the deepest cut take a step on everybody's mean gradient, all others one on each client's."""
    task = Task.of(replace(SPEC, cut=cut))
    whole = task.streams["1"]
    task = replace(task, streams={**task.streams, "1": lambda first: map(first_three_rows, whole(first))})
    trainer = OneModelTrainer(task, METHODS["one_model" if parts == 1 else "one_model_pipelined"])
    model, pairs = with_adapters(fresh(16, derive_seed(0, "tail")), alpha=16.0)
    blocks = {name: int(name.split(".")[2]) for name in pairs}
    shared = adamw(flat({name: pair for name, pair in pairs.items() if blocks[name] < cut}))
    alone = adamw(flat({name: pair for name, pair in pairs.items() if blocks[name] >= cut}))
    for number in (1, 2):
        present = "0134"
        outcome = trainer.round(number, tuple(present))
        steps = list(zip(*(client_batches(task, client, number) for client in present), strict=True))
        assert outcome.tokens == tokens_of(batch for batches in steps for batch in batches)
        for batches, rate in zip(steps, RATES[number - 1], strict=True):
            for rows in torch.arange(SPEC.batch_size).chunk(parts):
                there = [rows[rows < len(batch["labels"])] for batch in batches]
                together = [{k: v[own] for k, v in batch.items()} for batch, own in zip(batches, there, strict=True)]
                step_of_one_model(model, shared, alone, [part for part in together if len(part["labels"])], rate)
        assert trainer.score().perplexity == pytest.approx(perplexity(model, task), rel=RELATIVE)
    found = trainer._adapters.factors()
    for name, (A, B) in pairs.items():
        require_trained_alike(name, found[name].A, A.detach())
        require_trained_alike(name, found[name].B, B.detach())


def test_flora_adds_what_every_client_trained_to_the_weights(task: Task) -> None:
    trainer = WholeTrainer(task, METHODS["flora"])
    trainer.round(1, tuple(RANKS))
    expected = linear_weights(load_reference())
    for client, share in token_shares(task, RANKS).items():
        model, pairs = with_adapters(fresh(RANKS[client], derive_seed(0, "head", 1, client)), alpha=16.0)
        train(model, adamw(flat(pairs)), [[batch] for batch in client_batches(task, client, 1)], RATES[0])
        for name, (A, B) in pairs.items():
            expected[name] += share * dense(A.detach(), B.detach(), 16.0 / RANKS[client])
    merged = trainer._model.segment.linear_modules()
    for name, weight in expected.items():
        found = merged[name].weight
        assert isinstance(found, Tensor)
        require_trained_alike(name, found.T, weight)


def end_norm(A: Any, B: Any) -> float:
    """Of the part that pruning would take away."""
    left = max(1, int(np.floor(0.99 * A.shape[0])))
    return float(np.linalg.norm(dense(A[left:], B[:, left:])))


def test_two_rounds_of_hetlora(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncation, penalty, pruning, zero padding and sparsity weights as the paper says, on dense matrices."""
    monkeypatch.setattr(pruning, "STRENGTH", strength := 0.5)  # so that two rounds prune some adapters
    trainer = WholeTrainer(task, METHODS["hetlora"])
    server = {name: (A.double().numpy(), B.double().numpy()) for name, (A, B) in fresh(16, 0, "global").items()}
    server_names = list(server)
    ranks = {client: dict.fromkeys(server, rank) for client, rank in RANKS.items()}
    for number in (1, 2):
        trained: dict[str, dict[str, tuple[Floats, Floats]]] = {}
        for client in RANKS:
            start = {n: (server[n][0][:r], server[n][1][:, :r] / SCALING) for n, r in ranks[client].items()}
            model, pairs = with_adapters({n: (torch.tensor(A), torch.tensor(B)) for n, (A, B) in start.items()})

            def taken_away(pairs: dict[str, Pair] = pairs) -> Tensor:
                """Every rank here loses one direction, its last."""
                return strength * torch.stack([A[-1].norm() * B[:, -1].norm() for A, B in pairs.values()]).sum()

            batches = [[batch] for batch in client_batches(task, client, number)]
            train(model, adamw(flat(pairs)), batches, RATES[number - 1], taken_away)
            after = {n: (A.detach().double().numpy(), B.detach().double().numpy()) for n, (A, B) in pairs.items()}
            for name, (A, B) in after.items():
                if end_norm(A, B) < end_norm(*start[name]):
                    ranks[client][name] = max(1, len(A) - 1)
            trained[client] = after
        trainer.round(number, tuple(RANKS))
        for name in server_names:
            norms = {client: np.linalg.norm(dense(*trained[client][name])) for client in RANKS}
            largest = max(len(trained[client][name][0]) for client in RANKS)
            mean_A, mean_B = np.zeros((largest, server[name][0].shape[1])), np.zeros((len(server[name][1]), largest))
            for client, norm in norms.items():
                A, B = trained[client][name]
                mean_A[: len(A)] += norm / sum(norms.values()) * A
                mean_B[:, : len(A)] += norm / sum(norms.values()) * SCALING * B
            server[name] = mean_A, mean_B
            require_trained_alike(name, trainer._global[name].A, mean_A)
            require_trained_alike(name, trainer._global[name].B, mean_B)
        assert {client: trainer._ranks[client] for client in RANKS} == ranks
    pruned = [rank < RANKS[client] for client in RANKS for rank in ranks[client].values()]
    assert any(pruned)
    assert not all(pruned)
    assert {n: pair.rank for n, pair in trainer._client_model("0", 3)[1].factors().items()} == ranks["0"]


def test_hetloras_penalty_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.rand(4, 5, generator=generator).requires_grad_()
    B = torch.rand(6, 4, generator=generator).requires_grad_()
    small_A, small_B = torch.rand(1, 5).requires_grad_(), torch.rand(6, 1).requires_grad_()
    value = penalty([(A, B), (small_A, small_B)])  # rank 1 loses nothing
    value.backward()  # type: ignore[no-untyped-call]
    a, b = A.detach()[3].double().numpy(), B.detach()[:, 3].double().numpy()
    length_a, length_b = np.sqrt((a**2).sum()), np.sqrt((b**2).sum())
    assert float(value.detach()) == pytest.approx(0.005 * length_a * length_b, rel=RELATIVE)
    assert A.grad is not None
    assert B.grad is not None
    expected_A, expected_B = np.zeros((4, 5)), np.zeros((6, 4))
    expected_A[3] = 0.005 * length_b * a / length_a
    expected_B[:, 3] = 0.005 * length_a * b / length_b
    assert difference(A.grad, expected_A) < ALGEBRA
    assert difference(B.grad, expected_B) < ALGEBRA
    assert small_A.grad is None or not small_A.grad.any()


def test_hetloras_penalty_lets_a_fresh_adapter_start() -> None:
    A, B = torch.ones(4, 5).requires_grad_(), torch.zeros(6, 4).requires_grad_()
    penalty([(A, B)]).backward()  # type: ignore[no-untyped-call]
    assert A.grad is not None
    assert B.grad is not None
    assert float(A.grad.abs().max()) < 1e-9
    assert not B.grad.any()


@pytest.mark.parametrize(
    ("rank", "before", "after", "left"),
    [
        (16, 2.0, 1.0, 15),
        (16, 1.0, 2.0, 16),
        (16, 1.0, 1.0, 16),
        (2, 2.0, 1.0, 1),
        (1, 2.0, 1.0, 1),
        (200, 2.0, 1.0, 198),
    ],
)
def test_hetlora_prunes_where_the_end_became_smaller(rank: int, before: float, after: float, left: int) -> None:
    def adapter(end: float) -> LoraFactors:
        A, B = torch.full((rank, 3), 7.0), torch.ones(4, rank)
        A[max(1, int(0.99 * rank)) :] = end  # what stays is the same before and after
        return LoraFactors(A, B, SCALING)

    assert ranks_after({"m": adapter(before)}, {"m": adapter(after)}) == {"m": left}


def best_approximation(matrix: Floats, rank: int) -> Floats:
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    truncated: Floats = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return truncated


def test_flexlora_hands_out_the_best_approximations_of_the_exact_sum(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Sequence[Contribution]] = []
    original: Callable[..., dict[str, LoraFactors]] = vars(whole_model)["aggregate"]

    def note(contributions: Sequence[Contribution], *others: Any) -> dict[str, LoraFactors]:
        sent.append(contributions)
        return original(contributions, *others)

    monkeypatch.setattr(whole_model, "aggregate", note)
    trainer = WholeTrainer(task, METHODS["flexlora"])
    trainer.round(1, tuple(RANKS))
    shares = token_shares(task, RANKS)
    trained = dict(zip(RANKS, (contribution.factors for contribution in sent[0]), strict=True))
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.3.mlp.c_proj", "transformer.h.7.mlp.c_fc"):
        pairs = {client: trained[client][name] for client in RANKS}
        assert {client: pair.rank for client, pair in pairs.items()} == RANKS
        exact = sum((shares[c] * dense(pair.A, pair.B) for c, pair in pairs.items()), np.zeros(1))
        whole = trainer._global[name]
        assert (whole.rank, whole.scaling) == (16, 1.0)
        assert difference(whole.delta(), best_approximation(exact, 16)) < ALGEBRA
        assert np.abs(best_approximation(exact, 16) - exact).max() > 10 * ALGEBRA  # rank 26 does not fit into 16
        for client, rank in {"0": 2, "1": 4, "2": 8, "3": 12, "4": 16}.items():
            started = trainer._client_model(client, 2)[1].factors()[name]
            assert (started.rank, started.scaling) == (rank, SCALING)
            assert difference(started.delta(), best_approximation(exact, rank)) < ALGEBRA


@pytest.mark.parametrize("method", ["hetlora", "flexlora"])
def test_a_larger_rank_than_last_rounds_starts_from_all_of_it(task: Task, method: str) -> None:
    """Client 2 was there alone, with rank 8. Client 3 has rank 12: its other directions change nothing yet."""
    trainer = WholeTrainer(task, METHODS[method])
    trainer.round(1, ("2",))
    for name, started in trainer._client_model("3", 2)[1].factors().items():
        assert started.rank == 12
        assert difference(started.delta(), trainer._global[name].delta()) < ALGEBRA
        assert started.A[8:].any(1).all()  # a zero row of A with a zero column of B would never learn


def test_ft_averages_full_trainings(task: Task) -> None:
    trainer = FullTrainer(task, METHODS["ft"])
    outcome = trainer.round(1, ("1", "3"))
    shares = token_shares(task, ("1", "3"))
    expected: dict[str, Floats] = {}
    losses = 0.0
    for client, share in shares.items():
        model = load_reference()
        batches = [[batch] for batch in client_batches(task, client, 1)]
        losses += share * fmean(train(model, adamw(model.parameters()), batches, RATES[0]))
        for name, weight in model.named_parameters():
            expected[name] = expected.get(name, 0.0) + share * weight.detach().double().numpy()
    found = dict(trainer._segment.model.named_parameters())
    assert found.keys() == expected.keys()
    assert outcome.train_loss == pytest.approx(losses, rel=RELATIVE)
    for name, weights in expected.items():
        require_trained_alike(name, found[name], weights)
    moved = {name: difference(weight, expected[name]) for name, weight in load_reference().named_parameters()}
    assert min(moved.values()) > 100 * TRAINED


def test_a_client_whose_ranks_cannot_fall_further_trains_on() -> None:
    """At a learning rate of 0.05 every adapter of a HetLoRA client had been pruned to rank 1: no penalty to derive."""
    pair = torch.ones(1, 3, requires_grad=True), torch.ones(4, 1, requires_grad=True)
    assert not penalty([pair]).requires_grad
    spec = RunSpec("hetlora", "homogeneous", "iid", 0, 1e-3, rounds=1, local_steps=1, rank=1, eval_examples=4)
    assert math.isfinite(run(spec).evaluations[-1].perplexity)
