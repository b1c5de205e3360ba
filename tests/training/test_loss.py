"""What a batch may hold, and what is no score: numbers that would be wrong and look right are refused."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import Segment, segment_from_model
from hsplit_flwr.training import loss
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.head import score_head, train_head
from hsplit_flwr.training.loss import Score, score_segment, tensors_of, token_losses
from hsplit_flwr.training.tail import SharedTail
from tests.helpers.models import tiny_model

TOLERANCE = 1e-5
"""relative, of a mean loss in fp32"""
Batch = dict[str, Tensor]


def batch(**changes: Any) -> Any:
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **changes}


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
"""two documents of four tokens in a row"""


def train(whole: Segment, given: Mapping[str, Tensor]) -> object:
    head = segment_from_model(tiny_model("llama"), 0, 2)
    config = TrainingConfig(1, 1)
    tail = SharedTail(whole, SegmentAdapters(whole, LoraSpec(0)), config)
    tail.open_training(["0"], 1, 0)
    session = tail.join("0", 2, 0)
    try:
        return train_head(head, SegmentAdapters(head, LoraSpec(2)), [given], session, config)
    finally:
        session.close()
        tail.close_training()


def score(whole: Segment, given: Mapping[str, Tensor]) -> object:
    tail = SharedTail(whole, SegmentAdapters(whole, LoraSpec(0)), TrainingConfig(1, 1))
    return score_head(segment_from_model(tiny_model("llama"), 0, 2), [given], tail.scorer("0", 2))


def central(whole: Segment, given: Mapping[str, Tensor]) -> object:
    return score_segment(whole, [given])


USES = [train, score, central]


def test_a_segment_on_another_device_takes_batches_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What travels is told by mask and labels together: a GPU's head had one of them here and one there, and failed."""
    segment = segment_from_model(tiny_model("llama").to("meta"))
    input_ids, mask, labels = tensors_of(batch(), segment)
    assert {tensor.device.type for tensor in (input_ids, mask, labels)} == {"cpu"}

    def model(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        assert input_ids.device.type == attention_mask.device.type == "meta"
        return SimpleNamespace(logits=torch.empty(*input_ids.shape, 97, device="meta"))

    monkeypatch.setattr(segment, "_view", lambda *_: model)
    assert token_losses(segment(input_ids, mask), labels).device.type == "meta"


def test_packed_rows_have_another_loss_in_transformers() -> None:
    """The story: a head that ignores positions trains on a loss that is not the batch's, and nobody hears of it."""
    model = tiny_model("llama")
    with torch.no_grad():
        packed, ignored = model(**batch(position_ids=PACKED)).loss, model(**batch()).loss
    assert abs(packed - ignored) > 0.01


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": PACKED},
        {"token_type_ids": torch.zeros(2, 8, dtype=torch.int64)},
        {"inputs_embeds": torch.zeros(2, 8, 32)},
        {"inputs_embeds": torch.zeros(2, 8, 32), "position_ids": PACKED},
    ],
    ids=lambda extra: " and ".join(extra),
)
def test_a_tensor_that_nobody_would_use_is_refused(
    use: Callable[[Segment, Any], object], extra: Mapping[str, Tensor]
) -> None:
    names = ", ".join(sorted(extra))
    with pytest.raises(ConfigError, match=rf"but input_ids, attention_mask, labels, found {names}: .*one document"):
        use(segment_from_model(tiny_model("llama")), batch(**extra))


@pytest.mark.parametrize("use", USES)
def test_a_mask_of_document_numbers_is_refused(use: Callable[[Segment, Any], object]) -> None:
    """Packing's other form: attention would take every number but 0 for 1."""
    mask = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]] * 2)
    with pytest.raises(ConfigError, match=r"of 1 \(token\) and 0 \(padding\), found values \[1, 2\]"):
        use(segment_from_model(tiny_model("llama")), batch(attention_mask=mask))


@pytest.mark.parametrize("use", USES)
def test_what_is_no_tensor_may_stay(use: Callable[[Segment, Any], object]) -> None:
    whole = segment_from_model(tiny_model("llama"))
    use(whole, batch(texts=["a", "b"], source="e2e", count=2))


def test_a_missing_tensor_and_unlike_shapes_are_refused() -> None:
    whole = segment_from_model(tiny_model("llama"))
    lacking = {key: tensor for key, tensor in batch().items() if key != "labels"}
    with pytest.raises(ConfigError, match=r"Expected batches with input_ids, .*found none for \['labels'\]"):
        tensors_of(lacking, whole)
    with pytest.raises(ConfigError, match=r"of one shape \(B, T\), found \(2, 8\), \(2, 8\), \(2, 7\)"):
        tensors_of(batch(labels=PACKED[:, :7]), whole)


# ------------------------------------------------------------------------------------------- no targets


def untargeted() -> Any:
    labels = torch.full((2, 8), -100)
    labels[:, 0] = 5  # the first position of a row is never predicted
    return batch(labels=labels)


@pytest.mark.parametrize("given", [[], [untargeted()], [untargeted()] * 3], ids=len)
def test_batches_without_target_tokens_have_no_score(given: list[Batch]) -> None:
    """The story: such an evaluation set had perplexity 1.0, the best there is."""
    whole = segment_from_model(tiny_model("llama"))
    with pytest.raises(ConfigError, match=rf"Expected batches to score, found {len(given)} with no target tokens\."):
        score_segment(whole, given)


def test_a_score_of_nothing_is_no_perplexity() -> None:
    nothing = Score(0.0, 0)
    for number in ("loss", "perplexity"):
        with pytest.raises(ConfigError, match="Expected labels to score, found no target tokens"):
            getattr(nothing, number)


def test_a_head_without_targets_says_that_it_measured_nothing() -> None:
    reply = score(segment_from_model(tiny_model("llama")), untargeted())
    assert reply == (0.0, 0)


def test_batches_without_targets_weigh_nothing_among_others() -> None:
    found = score_segment(segment_from_model(tiny_model("llama")), [untargeted(), batch()])
    with torch.no_grad():
        expected = float(tiny_model("llama")(**batch()).loss)
    assert found.tokens == 14
    assert found.loss == pytest.approx(expected, rel=TOLERANCE)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=TOLERANCE)


# ---- large vocabularies ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("positions", [1, 7, 60], ids=lambda n: f"{n} at once")
def test_losses_by_parts_are_those_of_the_whole_bit_for_bit(
    positions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The independent reference: torch's cross entropy of all positions at once, in float32."""
    generator = torch.Generator().manual_seed(0)
    B, T, V = 3, 20, 1_003
    logits = (5 * torch.randn(B, T, V, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 4:9] = -100
    weights = torch.randn(B, T, generator=generator)
    whole = logits.clone().requires_grad_()
    shifted = torch.cat([labels[:, 1:], torch.full((B, 1), -100)], dim=1)
    expected = F.cross_entropy(whole.float().view(B * T, V), shifted.view(-1), reduction="none").view(B, T)
    torch.autograd.backward(expected, weights)

    monkeypatch.setattr(loss, "PART_BYTES", 4 * V * positions)
    by_parts = logits.clone().requires_grad_()
    found = loss.token_losses(by_parts, labels)
    torch.autograd.backward(found, weights)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert by_parts.grad is not None
    assert whole.grad is not None
    assert torch.equal(by_parts.grad, whole.grad)
    with torch.no_grad():
        assert torch.equal(loss.token_losses(logits, labels), expected)
