"""Training as the experiments' methods are defined: transformers' model and loss, PEFT, torch's AdamW; none of our own.

Shared with the engine under test: batches, the seeds of fresh adapters, the tiny checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.lora.factors import init_lora_A
from hsplit_flwr.models.assets import tiny_checkpoint

TRAINED = 1e-5
"""largest absolute difference of trained fp32 values, but for `NOISY`"""
NOISY = 1e-3
"""share of a tensor's values (or two of them) that may differ by more, though by less than a learning rate: AdamW
divides each gradient by its own size, so that where the terms of a gradient cancel, rounding moves the value visibly"""
RELATIVE = 1e-5
"""of losses and perplexities"""
ALGEBRA = 1e-6
"""largest absolute difference where both sides start from the same trained factors"""
SCALING = 2.0
SPEC = RunSpec(
    method="hsplitlora",
    setting="heterogeneous",
    partition="dirichlet",
    seed=0,
    learning_rate=4e-3,
    rounds=2,
    local_steps=2,
    warmup_steps=2,
    eval_examples=8,
)
RATES = ((2e-3, 4e-3), (4e-3, 2e-3))
"""by round and step: two steps of warm-up, then linearly down to 0 after the fourth"""
Pair = tuple[Tensor, Tensor]
"""A (r, d_in), B (d_out, r)"""
Batch = Mapping[str, Tensor]
Floats = NDArray[np.float64]


def client_batches(task: Task, client: str, number: int) -> list[Batch]:
    stream = task.streams[client]((number - 1) * SPEC.local_steps)
    return [next(stream) for _ in range(SPEC.local_steps)]


def tokens_of(batches: Iterable[Batch]) -> int:
    return sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)


def token_shares(task: Task, clients: Iterable[str], number: int = 1) -> dict[str, float]:
    counts = {client: tokens_of(client_batches(task, client, number)) for client in clients}
    return {client: count / sum(counts.values()) for client, count in counts.items()}


def load_reference() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    return model


def with_adapters(start: Mapping[str, Pair], alpha: float | None = None) -> tuple[Any, dict[str, Pair]]:
    """PEFT's model with adapters of one alpha, or of alpha = 2r, that start there; the adapters by module."""
    ranks = {name: A.shape[0] for name, (A, _) in start.items()}
    config = peft.LoraConfig(
        target_modules=list(start),
        rank_pattern=ranks,
        alpha_pattern={name: alpha or SCALING * rank for name, rank in ranks.items()},
        fan_in_fan_out=True,
    )
    model = peft.get_peft_model(load_reference(), config).eval()
    pairs = {}
    for name, (A, B) in start.items():
        layer = model.base_model.model.get_submodule(name)
        pairs[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        pairs[name][0].data.copy_(A)
        pairs[name][1].data.copy_(B)
    return model, pairs


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Sequence[Batch]],
    rates: Iterable[float],
    extra: Callable[[], Tensor | float] = lambda: 0.0,
) -> list[float]:
    """A step per rate; its loss is the mean over the tokens of its batches, plus `extra`."""
    losses = []
    for batches, rate in zip(steps, rates, strict=True):
        optimizer.zero_grad()
        total = tokens_of(batches)
        parts = [model(**batch).loss * (tokens_of([batch]) / total) for batch in batches]
        loss = torch.stack(parts).sum()
        torch.autograd.backward(loss + torch.as_tensor(extra()))
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def flat(pairs: Mapping[str, Pair]) -> list[Tensor]:
    return [factor for pair in pairs.values() for factor in pair]


def perplexity(model: Any, task: Task) -> float:
    batches = list(task.eval_batches)
    with torch.no_grad():
        nll = sum(float(model(**batch).loss) * tokens_of([batch]) for batch in batches)
    return float(np.exp(nll / tokens_of(batches)))


def fresh(rank: int, *seed: object) -> dict[str, Pair]:
    """A of every linear layer by the seed and its name, B zero."""
    pairs = {}
    for name, weight in linear_weights(load_reference()).items():
        d_out, d_in = weight.shape
        pairs[name] = init_lora_A(rank, d_in, derive_seed(*seed, name)), torch.zeros(d_out, rank)
    return pairs


def linear_weights(model: PreTrainedModel) -> dict[str, Floats]:
    """(d_out, d_in) of every linear layer; GPT-2's Conv1D stores the transpose."""
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    assert len(layers) == 4 * model.config.n_layer
    return {name: layer.weight.detach().double().numpy().T.copy() for name, layer in layers.items()}


def difference(found: Tensor, expected: Floats | Tensor) -> float:
    return float(np.abs(found.detach().double().numpy() - np.asarray(expected, np.float64)).max())


def require_trained_alike(name: str, found: Tensor, expected: Floats | Tensor) -> None:
    far = np.abs(found.detach().double().numpy() - np.asarray(expected, np.float64))
    assert (far > TRAINED).sum() <= max(2, NOISY * far.size), f"{name}: {(far > TRAINED).mean():.1%} differ"
    assert far.max() < SPEC.learning_rate, name
