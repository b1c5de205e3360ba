from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hsplit_flwr.data.text_batches import Example, TextBatches, prompt_text
from hsplit_flwr.data.token_row import IGNORE
from hsplit_flwr.errors import ConfigError

WORDS = ["<eos>", "<pad>", "=>", "name", "Fox", "Owl", "is", "a", "bar", "cafe", "here", "and", "there"]
EXAMPLES = [
    Example("name Fox", "Fox is a bar"),
    Example("name Owl", "Owl is a cafe here and there"),
    Example("name Fox and Owl", "Fox and Owl"),
    Example("name Owl bar", "a bar"),
    Example("cafe", "here"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, so that expected tensors can be written by hand."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def build(tokenizer: Any, examples: list[Example] = EXAMPLES, **options: Any) -> TextBatches:
    return TextBatches(examples, tokenizer, **({"batch_size": 2, "max_length": 16} | options))


def sentences(batch: dict[str, Tensor]) -> list[str]:
    """The texts of a batch, decoded by hand from the ids that count."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [" ".join(WORDS[i] for i, seen in zip(ids, mask, strict=True) if seen) for ids, mask in rows]


def whole(example: Example) -> str:
    return f"{example.mr} => {example.ref} <eos>"


def test_batch_has_loss_on_target_and_end_token_only(tokenizer: Any) -> None:
    (batch,) = build(tokenizer, EXAMPLES[:2], shuffle=False)
    assert batch["input_ids"].tolist() == [
        [3, 4, 2, 4, 6, 7, 8, 0, 1, 1, 1],
        [3, 5, 2, 5, 6, 7, 9, 10, 11, 12, 0],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 8 + [0] * 3, [1] * 11]
    assert batch["labels"].tolist() == [
        [IGNORE] * 3 + [4, 6, 7, 8, 0] + [IGNORE] * 3,
        [IGNORE] * 3 + [5, 6, 7, 9, 10, 11, 12, 0],
    ]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_prompt_text_is_what_the_batch_masks(tokenizer: Any) -> None:
    for example, batch in zip(EXAMPLES, build(tokenizer, shuffle=False, batch_size=1), strict=True):
        prompt = batch["input_ids"][batch["labels"] == IGNORE].tolist()
        assert prompt == tokenizer(prompt_text(example.mr))["input_ids"]


def test_padding_to_max_length_changes_only_the_width(tokenizer: Any) -> None:
    short, long = build(tokenizer, shuffle=False), build(tokenizer, shuffle=False, pad_to_max_length=True)
    for narrow, wide in zip(short, long, strict=True):
        width = narrow["input_ids"].shape[1]
        for name, filler in (("input_ids", 1), ("attention_mask", 0), ("labels", IGNORE)):
            assert wide[name].shape[1] == 16
            assert torch.equal(wide[name][:, :width], narrow[name])
            assert bool((wide[name][:, width:] == filler).all())


def test_tokenizer_without_pad_token_pads_with_the_end_token_unseen(tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    (batch,) = build(bare, EXAMPLES[:2], shuffle=False)
    assert batch["input_ids"][0, 8:].tolist() == [0, 0, 0]
    assert batch["attention_mask"][0].tolist() == [1] * 8 + [0] * 3
    assert batch["labels"][0, 8:].tolist() == [IGNORE] * 3


def test_every_epoch_has_every_example_once_in_another_order(tokenizer: Any) -> None:
    batches = build(tokenizer, EXAMPLES * 4, batch_size=3)
    assert len(batches) == 7
    epochs = [[text for batch in batches for text in sentences(batch)] for _ in range(3)]
    expected = Counter(whole(example) for example in EXAMPLES * 4)
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_is_decided_by_the_seed(tokenizer: Any) -> None:
    first, again, other = (
        [sentences(batch) for batch in build(tokenizer, EXAMPLES * 4, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_without_shuffle_every_pass_keeps_the_order(tokenizer: Any) -> None:
    batches = build(tokenizer, shuffle=False)
    for _ in range(2):
        assert [text for batch in batches for text in sentences(batch)] == [whole(e) for e in EXAMPLES]


def test_stream_of_a_new_object_continues_where_another_stopped(tokenizer: Any) -> None:
    one_process = list(islice(build(tokenizer).stream(), 11))  # 3 batches an epoch: more than three epochs
    for start, stop in ((0, 2), (2, 5), (5, 11)):
        part = list(islice(build(tokenizer).stream(start), stop - start))
        for mine, theirs in zip(part, one_process[start:stop], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_passes_are_the_epochs_of_the_stream(tokenizer: Any) -> None:
    batches = build(tokenizer)
    passes = [sentences(batch) for _ in range(3) for batch in batches]
    assert passes == [sentences(batch) for batch in islice(batches.stream(), 9)]


def test_long_targets_are_cut_and_counted(tokenizer: Any) -> None:
    batches = build(tokenizer, max_length=8, shuffle=False)  # lengths: 8, 11, 9, 7, 4
    assert batches.truncated == 2
    texts = [text for batch in batches for text in sentences(batch)]
    assert texts[0] == whole(EXAMPLES[0])
    assert texts[1] == "name Owl => Owl is a cafe here"
    assert texts[2] == "name Fox and Owl => Fox and Owl"
    assert build(tokenizer, max_length=11).truncated == 0


def test_an_example_whose_prompt_leaves_no_room_is_left_out_and_reported(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One prompt of 901 tokens among a client's rows made that client fail in every round, the row unnamed."""
    assert build(tokenizer, max_length=6).dropped == 0
    assert not caplog.records
    batches = build(tokenizer, max_length=5, shuffle=False)
    assert batches.dropped == 1
    assert (
        "max-length=5 tokens: 1 of 5 examples with longer prompts, the first of 5 tokens in row 2: 'name Fox and Owl'"
    ) in caplog.text
    texts = [text for batch in batches for text in sentences(batch)]
    assert texts == ["name Fox => Fox is", "name Owl => Owl is", "name Owl bar => a", "cafe => here <eos>"]


def test_a_long_prompt_is_named_by_its_start_alone(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    build(tokenizer, [*EXAMPLES, Example("Fox " * 900, "a bar")])
    assert f"the first of 901 tokens in row 5: {('Fox ' * 15)!r}" in caplog.text


def test_nothing_but_prompts_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"max-length=2 tokens, found 5 of 5 examples .* 3 tokens in row 0: 'name F"):
        build(tokenizer, max_length=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "Expected batch_size >= 1, found 0"),
        ({"seed": -1}, "Expected seed >= 0, found -1"),
        ({"examples": []}, "Expected at least one example, found none"),
    ],
)
def test_bad_options_are_refused(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tokenizer, **options)


def test_negative_start_is_refused_at_once(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="Expected start_step >= 0, found -3"):
        build(tokenizer).stream(-3)


def test_tokenizer_without_end_token_is_refused(tokenizer: Any) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="Expected a tokenizer with an end token, found none"):
        build(endless)
