"""FedEx-LoRA, FFA-LoRA and LoRA-FAIR round by round: on whole models against PEFT's training, and on heads and tail."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hsplit_flwr.common.seeds import tail_seed
from hsplit_flwr.experiments.method_server import MethodServer
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.rivals import whole_model
from hsplit_flwr.experiments.rivals.fair import STRENGTH
from hsplit_flwr.experiments.rivals.whole_model import WholeTrainer
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.lora.aggregation import Contribution
from hsplit_flwr.lora.factors import LoraFactors
from tests.helpers.references import (
    ALGEBRA,
    RATES,
    RELATIVE,
    SCALING,
    SPEC,
    Floats,
    adamw,
    client_batches,
    difference,
    fresh,
    linear_weights,
    load_reference,
    perplexity,
    require_trained_alike,
    token_shares,
    train,
    with_adapters,
)

PRESENT = ("0", "2", "4")
CLIENTS = ("0", "1", "2", "3", "4")
APART = 1e-4
"""largest absolute difference of products of factors that were trained apart, see `TRAINED`"""
STATIONARY = 1e-3
"""of the objective's gradient at the averaged B, what is left at the B that was found, which is rounded to float32"""
Arrays = Mapping[str, tuple[Floats, Floats]]
"""A and B by module, B without its scaling"""
Sent = tuple[Sequence[Contribution], Mapping[str, LoraFactors]]
"""what heads and the tail bring to the end of a round"""


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.of(SPEC)


@pytest.fixture(scope="module")
def deep() -> Task:
    """Heads of 1, 3, 4, 6 and 7 blocks."""
    return Task.of(replace(SPEC, setting="deep_heads"))


def trained_by_peft(
    task: Task, base: Mapping[str, Floats], start: Arrays, client: str, number: int, *, frozen_A: bool
) -> Arrays:
    """A client's round from `start` on the weights `base`, with a new optimizer."""
    model, pairs = with_adapters({n: (torch.tensor(A), torch.tensor(B)) for n, (A, B) in start.items()})
    for name, weight in base.items():
        layer = model.base_model.model.get_submodule(name)
        layer.base_layer.weight.data.copy_(torch.from_numpy(weight.T))
    for A, _ in pairs.values():
        A.requires_grad_(not frozen_A)
    trainable = [factor for pair in pairs.values() for factor in pair if factor.requires_grad]
    train(model, adamw(trainable), [[batch] for batch in client_batches(task, client, number)], RATES[number - 1])
    return {n: (A.detach().double().numpy(), B.detach().double().numpy()) for n, (A, B) in pairs.items()}


def fresh_arrays(rank: int, *seed: object) -> Arrays:
    return {name: (A.double().numpy(), B.double().numpy()) for name, (A, B) in fresh(rank, *seed).items()}


def dense(pair: LoraFactors) -> Floats:
    product: Floats = pair.scaling * (pair.B.double().numpy() @ pair.A.double().numpy())
    return product


def weights_of(layers: Mapping[str, Any]) -> dict[str, Floats]:
    """(d_out, d_in) of every linear layer."""
    return {name: layer.weight.detach().double().numpy().T.copy() for name, layer in layers.items()}


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What every round of a whole-model method is aggregated of."""
    sent: list[Sent] = []
    original = vars(whole_model)["aggregate"]

    def note(contributions: Any, *others: Any) -> Any:
        sent.append((contributions, {}))
        return original(contributions, *others)

    monkeypatch.setattr(whole_model, "aggregate", note)
    return sent


@pytest.mark.parametrize("method", ["fedex_lora", "ffa_lora"])
def test_two_rounds_on_whole_models(task: Task, method: str, brought: list[Sent]) -> None:
    """Rank 8. Means of A and B, and in the weights what they lack (FedEx-LoRA); or one A, and the mean of B."""
    frozen_A = method == "ffa_lora"
    trainer = WholeTrainer(task, METHODS[method])
    base, server = linear_weights(load_reference()), fresh_arrays(8, 0, "global")
    first_A = {name: A for name, (A, _) in server.items()}
    for number in (1, 2):
        shares = token_shares(task, PRESENT, number)
        done = {c: trained_by_peft(task, base, server, c, number, frozen_A=frozen_A) for c in PRESENT}
        before = weights_of(trainer._model.segment.linear_modules())
        outcome = trainer.round(number, PRESENT)
        server = {
            name: (
                sum((share * done[c][name][0] for c, share in shares.items()), np.zeros(1)),
                sum((share * done[c][name][1] for c, share in shares.items()), np.zeros(1)),
            )
            for name in base
        }
        merged = weights_of(trainer._model.segment.linear_modules())
        for name, (A, B) in server.items():
            exact = sum((p * SCALING * done[c][name][1] @ done[c][name][0] for c, p in shares.items()), np.zeros(1))
            if not frozen_A:
                base[name] = base[name] + exact - SCALING * B @ A
            found = trainer._global[name]
            if frozen_A:
                assert difference(found.A, first_A[name]) == 0.0
                assert np.abs(dense(found) - exact).max() < APART
            summed = sum((c.weight * dense(c.factors[name]) for c in brought[-1][0]), np.zeros(1))
            assert np.abs(merged[name] + dense(found) - before[name] - summed).max() < ALGEBRA
            require_trained_alike(name, found.A, A)
            require_trained_alike(name, found.B, SCALING * B)
            assert np.abs(merged[name] - base[name]).max() < APART
        sent = sum(B.nbytes + (0 if frozen_A else A.nbytes) for A, B in server.values()) / 2  # float32
        assert {work.upload_bytes for work in outcome.work} == {sent}
        lacking = {work.download_bytes - sent for work in outcome.work}
        assert all(more == 0 for more in lacking) == (frozen_A or number == 1)


def fair_gradient(B: Floats, mean_B: Floats, mean_A: Floats, exact: Floats, strength: float) -> Floats:
    """Of the dense objective; zero where it has its minimum."""
    product = B @ mean_A
    length, exact_length = np.linalg.norm(product), np.linalg.norm(exact)
    cosine = (product * exact).sum() / (length * exact_length)
    by_product = cosine * product / length**2 - exact / (length * exact_length)
    gradient: Floats = by_product @ mean_A.T + 2 * strength * (B - mean_B)
    return gradient


def require_fair(pairs: Sequence[tuple[float, LoraFactors]], found: LoraFactors) -> None:
    """`found` is the mean A, and a B at which the objective, for B without its scaling, is stationary."""
    scaling = pairs[0][1].scaling
    mean_A = sum((p * pair.A.double().numpy() for p, pair in pairs), np.zeros(1))
    mean_B = sum((p * pair.B.double().numpy() for p, pair in pairs), np.zeros(1))
    exact = sum((p * dense(pair) for p, pair in pairs), np.zeros(1))
    assert difference(found.A, mean_A) < ALGEBRA
    arguments = mean_B, mean_A, exact, STRENGTH
    left = np.linalg.norm(fair_gradient(found.B.double().numpy() / scaling, *arguments))
    assert left < STATIONARY * np.linalg.norm(fair_gradient(mean_B, *arguments))
    assert np.linalg.norm(found.B.double().numpy() / scaling - mean_B) > 1e-3 * np.linalg.norm(mean_B)


def test_two_rounds_of_lora_fair_on_whole_models(task: Task, brought: list[Sent]) -> None:
    trainer = WholeTrainer(task, METHODS["lora_fair"])
    for number in (1, 2):
        trainer.round(number, PRESENT)
        shares = token_shares(task, PRESENT, number).values()
        for name, found in trainer._global.items():
            factors = [contribution.factors[name] for contribution in brought[-1][0]]
            assert {pair.rank for pair in factors} == {8}
            require_fair(list(zip(shares, factors, strict=True)), found)
        started = trainer._client_model("1", number + 1)[1].factors()
        for name, pair in started.items():
            assert difference(pair.A, trainer._global[name].A) == 0.0
            assert np.abs(dense(pair) - dense(trainer._global[name])).max() < ALGEBRA


class Rounds:
    """Rounds of a split method, and what heads and tail began each with and brought to its end."""

    def __init__(self, task: Task, trainer: SplitTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.task, self.trainer = task, trainer
        self.sent: list[Sent] = []
        self.tail_starts: list[Mapping[str, LoraFactors]] = []
        merge, open_training = MethodServer.merge, MethodServer.open_training

        def note_merge(server: MethodServer, contributions: Any, tail: Any) -> None:
            self.sent.append((contributions, tail))
            merge(server, contributions, tail)

        def note_open(server: MethodServer, *arguments: Any) -> Any:
            tasks = open_training(server, *arguments)
            self.tail_starts.append(server.tail_rounds.tail.adapters.factors())
            self.weights_at_open = self.weights()
            return tasks

        monkeypatch.setattr(MethodServer, "merge", note_merge)
        monkeypatch.setattr(MethodServer, "open_training", note_open)

    def weights(self) -> dict[str, Floats]:
        """Of the global model: frozen weights, what is carried, and what is the tail's own."""
        server = self.trainer.server
        total = weights_of(server.model.segment.linear_modules())
        for name, pair in {**server.average, **server.tail_rounds.unmerged()}.items():
            total[name] += dense(pair)
        return total

    def terms(self, name: str) -> list[tuple[float, LoraFactors]]:
        """Of the last round: every client's head, or the tail where its head ends before the block."""
        contributions, tail = self.sent[-1]
        block = int(name.split(".")[2])
        held = [(c.weight, c.factors[name]) for c in contributions if block < c.cut]
        left = sum(c.weight for c in contributions if block >= c.cut)
        return [*held, *([(left, tail[name])] if left > 0 else [])]


@pytest.fixture
def rounds(deep: Task, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    return Rounds(deep, SplitTrainer(deep, METHODS[request.param]), monkeypatch)


SHARED = [f"transformer.h.{block}.{matrix}" for block in range(7) for matrix in ("attn.c_attn", "mlp.c_proj")]
TAILS_OWN = ("transformer.h.7.attn.c_attn", "transformer.h.7.mlp.c_proj")


@pytest.mark.parametrize("rounds", ["with_fedex", "with_ffa"], indirect=True)
def test_heads_of_unequal_cuts_are_summed_exactly(rounds: Rounds) -> None:
    """The weights after a round are those before it, less the adapters that all began with, plus the weighted sum."""
    trainer, before = rounds.trainer, rounds.weights()
    for number in (1, 2):
        carried = dict(trainer.server.average)
        trainer.round(number, CLIENTS)
        after = rounds.weights()
        for name in SHARED:
            exact = sum((weight * dense(pair) for weight, pair in rounds.terms(name)), np.zeros(1))
            began = dense(carried[name]) if name in carried else 0.0
            assert np.abs(after[name] - (before[name] - began + exact)).max() < ALGEBRA, name
        before = after
    expected = load_reference()
    for name, weight in before.items():
        expected.get_submodule(name).weight.data.copy_(torch.from_numpy(weight.T))
    assert trainer.score().perplexity == pytest.approx(perplexity(expected, rounds.task), rel=RELATIVE)


@pytest.mark.parametrize("rounds", ["with_fedex", "with_fair"], indirect=True)
def test_heads_and_tail_go_on_from_one_mean(rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = rounds.trainer
    trainer.round(1, CLIENTS)
    average = dict(trainer.server.average)
    for name in SHARED:
        terms = rounds.terms(name)
        assert difference(average[name].A, sum((w * p.A.double().numpy() for w, p in terms), np.zeros(1))) < ALGEBRA
        if trainer.server._method.correction == "lora_fair":
            require_fair(terms, average[name])
    own = {name: trainer.server.tail_rounds.unmerged()[name] for name in TAILS_OWN}
    starts: dict[str, Mapping[str, LoraFactors]] = {}
    head_of = trainer._head

    def note(round_task: Any) -> Any:
        head = head_of(round_task)
        starts[round_task.client] = head.adapters.factors()
        assert not head.optimizer.state()["parameters"]
        return head

    monkeypatch.setattr(trainer, "_head", note)
    trainer.round(2, CLIENTS)
    held = [*starts.values(), rounds.tail_starts[1]]
    assert [len({name for name in factors if name in SHARED}) for factors in held] == [2, 6, 8, 12, 14, 12]
    for factors in held:
        for name in set(factors).intersection(SHARED):
            assert difference(factors[name].A, average[name].A) == 0.0
            assert np.abs(dense(factors[name]) - dense(average[name])).max() < ALGEBRA
    for name in TAILS_OWN:
        assert difference(rounds.tail_starts[1][name].A, own[name].A) == 0.0


@pytest.mark.parametrize("rounds", ["with_ffa"], indirect=True)
def test_a_never_changes_where_heads_and_tail_share_it(rounds: Rounds) -> None:
    first = {name: A for name, (A, _) in fresh(16, tail_seed(0, 1)).items()}
    for number in (1, 2):
        rounds.trainer.round(number, CLIENTS)
        contributions, tail = rounds.sent[-1]
        for factors in [*(contribution.factors for contribution in contributions), tail]:
            for name in set(factors).intersection(SHARED):
                assert difference(factors[name].A, first[name]) == 0.0
                assert factors[name].B.any()
        for name in TAILS_OWN:
            assert difference(tail[name].A, first[name]) > ALGEBRA
    base = weights_of(rounds.trainer.server.model.segment.linear_modules())
    assert all(np.array_equal(weight, base[name]) for name, weight in linear_weights(load_reference()).items())


@pytest.mark.parametrize("method", ["with_fedex", "with_ffa", "with_fair"])
def test_a_new_plan_loses_nothing(task: Task, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As deep heads as fit are planned anew once importance is known: with other ranks, all restart from the sum."""
    rounds = Rounds(task, SplitTrainer(task, replace(METHODS[method], deep_heads=True)), monkeypatch)
    rounds.trainer.round(1, CLIENTS)
    before, average = rounds.weights(), dict(rounds.trainer.server.average)
    rounds.trainer.round(2, CLIENTS)
    for name, weight in before.items():
        assert np.abs(rounds.weights_at_open[name] - weight).max() < ALGEBRA
    restarted = rounds.tail_starts[1]
    shared = [name for name in average if name in restarted]
    assert shared
    assert not any(restarted[name].B.any() for name in shared)
    terms = [rounds.terms(name) for name in average]
    assert len({pair.rank for pairs in terms for _, pair in pairs}) > 1
    if method != "with_fair":
        for name, pairs in zip(average, terms, strict=True):
            exact = sum((weight * dense(pair) for weight, pair in pairs), np.zeros(1))
            assert np.abs(rounds.weights()[name] - rounds.weights_at_open[name] - exact).max() < ALGEBRA
