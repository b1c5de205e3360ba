"""Heads and a joint tail have, together, the gradient of central training: at unequal cuts, tensor by tensor.

Nothing of the package hands gradients around: what that would bring was measured, and is less than it costs
(simulations/README.md). Here the test itself does, so that it is shown that nothing but an exchange is missing.
"""

from collections.abc import Mapping

import peft
import pytest
import torch
from torch import Tensor, nn

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import block_of, segment_from_model
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.step import StepRequest
from hsplit_flwr.training.tail_step import TailTrainer
from tests.helpers.federation import random_batches
from tests.helpers.models import tiny_model
from tests.helpers.replies import gradient_of

STEPS = 5
TOLERANCE = 1e-5
"""largest absolute difference of fp32 adapters after so many AdamW steps"""
RATE = 5e-3
LORA = LoraSpec(4, 8.0)
CONFIG = TrainingConfig(1, STEPS, RATE, warmup_steps=0, max_grad_norm=0.0, joint_steps=True, importance_steps=0)
CUTS = [{"a": 1, "b": 3, "c": 2}, {"a": 3, "b": 3, "c": 1}, {"a": 2, "b": 1, "c": 2}]
BATCHES = {c: random_batches(STEPS, seed=ord(c), rows=rows) for c, rows in (("a", 2), ("b", 3), ("c", 4))}
"""of unequal target tokens"""
Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]
Batch = Mapping[str, Tensor]


def tokens_of(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def fresh_pairs() -> Pairs:
    """A by the module's name, B zero: of every linear layer."""
    pairs = {}
    for name, module in tiny_model("llama").named_modules():
        if name.endswith("_proj"):
            d_out, d_in = module.weight.shape
            A = init_lora_A(LORA.r, d_in, derive_seed(7, name))
            pairs[name] = nn.Parameter(A), nn.Parameter(torch.zeros(d_out, LORA.r))
    return pairs


def adamw(pairs: Pairs) -> torch.optim.AdamW:
    return torch.optim.AdamW([factor for pair in pairs.values() for factor in pair], lr=RATE, weight_decay=0.0)


def central() -> Pairs:
    """PEFT on the whole model; a step takes the mean over all target tokens of all clients."""
    pairs = fresh_pairs()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(pairs))
    model = peft.get_peft_model(tiny_model("llama"), config)
    for name, (A, B) in pairs.items():
        layer = model.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B
    optimizer = adamw(pairs)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = CONFIG.learning_rate_at(step)
        batches = [BATCHES[client][step] for client in BATCHES]
        total = sum(map(tokens_of, batches))
        for batch in batches:
            torch.autograd.backward(model(**batch).loss * (tokens_of(batch) / total))
        optimizer.step()
        optimizer.zero_grad()
    return pairs


class Split:
    """Heads and a tail that hold the same adapters at every step."""

    def __init__(self, cuts: Mapping[str, int]) -> None:
        self.cuts = cuts
        self.pairs = fresh_pairs()
        self.heads = {client: segment_from_model(tiny_model("llama"), 0, cut) for client, cut in cuts.items()}
        self.adapters = {client: SegmentAdapters(head, LORA) for client, head in self.heads.items()}
        whole = segment_from_model(tiny_model("llama"))
        shared = [name for name in whole.linear_modules() if block_of(name) >= min(cuts.values())]
        self.tail = TailTrainer(whole, SegmentAdapters(whole, LORA, shared), CONFIG)
        self.tail.open_round(0)

    def train(self) -> Pairs:
        optimizer = adamw(self.pairs)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = CONFIG.learning_rate_at(step)
            self._add_gradients(step)
            optimizer.step()
            optimizer.zero_grad()
        return self.pairs

    def _add_gradients(self, step: int) -> None:
        """The tail's, of all clients' tokens, and each head's, of its own mean loss, by its share of the tokens."""
        for adapters in (self.tail.adapters, *self.adapters.values()):
            now = {n: LoraFactors(A.detach(), B.detach(), LORA.scaling(n)) for n, (A, B) in self.pairs.items()}
            adapters.set({name: now[name] for name in adapters.module_names})
        batches = {client: BATCHES[client][step] for client in self.cuts}
        hidden = {c: head(batches[c]["input_ids"], batches[c]["attention_mask"]) for c, head in self.heads.items()}
        requests = [
            StepRequest(
                client=client,
                cut=cut,
                run_step=step,
                activations=hidden[client].detach(),
                attention_mask=batches[client]["attention_mask"],
                labels=batches[client]["labels"],
            )
            for client, cut in self.cuts.items()
        ]
        replies = self.tail.train(requests).replies
        self._add(self.tail.adapters, 1.0)  # the step that the tail took is undone above, its gradients are still there
        total = sum(map(tokens_of, batches.values()))
        for client, reply in replies.items():
            torch.autograd.backward(hidden[client], gradient_of(reply))
            self._add(self.adapters[client], tokens_of(batches[client]) / total)

    def _add(self, adapters: SegmentAdapters, share: float) -> None:
        for name in adapters.module_names:
            for own, factor in zip(adapters.parameters([name]), self.pairs[name], strict=True):
                gradient = share * own.grad if own.grad is not None else torch.zeros_like(own)
                factor.grad = gradient if factor.grad is None else factor.grad + gradient


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_with_one_step_on_everybodys_gradients_it_is_central_training(cuts: Mapping[str, int]) -> None:
    expected, found = central(), Split(cuts).train()
    start = fresh_pairs()
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for ours, theirs, first in zip(found[name], pair, start[name], strict=True):
            assert (ours - theirs).abs().max() <= TOLERANCE, name
            assert (theirs - first).abs().max() > 100 * TOLERANCE, name
