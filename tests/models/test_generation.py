import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.generation import generate_texts

PROMPTS = [
    "The history of",
    "Water is",
    "In 1999, the mayor of the small town decided that",
    "A",
    "name[The Fox], food[Thai] =>",
]
TOKENS = 24


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_checkpoint())
    return loaded


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint())


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(T, V), without padding, cache or ``generate``."""
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return output


def greedy(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int = TOKENS) -> list[int]:
    """Token by token: the most likely one, up to and with the end token."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < tokens and tokenizer.eos_token_id not in new:
        new.append(int(logits(model, ids + new)[-1].argmax()))
    return new


def greedy_text(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int = TOKENS) -> str:
    text: str = tokenizer.decode(greedy(model, tokenizer, prompt, tokens), skip_special_tokens=True)
    return text.strip()


@pytest.mark.parametrize(("batch_size", "side"), [(1, "right"), (2, "right"), (16, "right"), (16, "left")])
def test_batches_write_what_the_most_likely_tokens_one_by_one_say(
    model: PreTrainedModel, tokenizer: Any, batch_size: int, side: str
) -> None:
    tokenizer.padding_side = side
    texts = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=TOKENS, batch_size=batch_size)
    assert texts == [greedy_text(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(texts)) == len(PROMPTS)
    assert tokenizer.padding_side == side


def test_end_token_ends_a_text(model: PreTrainedModel, tokenizer: Any) -> None:
    """Any token may be made the end: the text is what greedy wrote before it."""
    full = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    assert any(row[-1] == tokenizer.eos_token_id for row in full)  # the true end token ends some texts early
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(full[0][3])
    end = tokenizer.eos_token_id
    first = generate_texts(model, tokenizer, PROMPTS[:1], max_new_tokens=TOKENS)
    assert first == [tokenizer.decode(full[0][: full[0].index(end)]).strip()]


def test_text_is_cut_at_max_new_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    texts = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=3)
    assert texts == [greedy_text(model, tokenizer, prompt, 3) for prompt in PROMPTS]


def test_without_pad_token_the_end_token_pads_and_the_tokenizer_stays(model: PreTrainedModel, tokenizer: Any) -> None:
    expected = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=TOKENS)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert bare.pad_token_id is None
    assert generate_texts(model, bare, PROMPTS, max_new_tokens=TOKENS) == expected
    assert bare.pad_token_id is None
    assert bare.padding_side == tokenizer.padding_side


def test_beams_find_a_likelier_text_and_do_not_depend_on_the_batch(model: PreTrainedModel, tokenizer: Any) -> None:
    wide = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=TOKENS, num_beams=4)
    alone = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=TOKENS, num_beams=4, batch_size=1)
    assert wide == alone
    narrow = [greedy_text(model, tokenizer, prompt) for prompt in PROMPTS]

    def per_token(prompt: str, text: str) -> float:
        """Mean log-probability of the text and its end token, what beam search ranks by."""
        start = tokenizer(prompt)["input_ids"]
        ids = [*start, *tokenizer(" " + text)["input_ids"], tokenizer.eos_token_id]
        steps = torch.log_softmax(logits(model, ids), dim=-1)
        return float(steps[range(len(start) - 1, len(ids) - 1), ids[len(start) :]].mean())

    changed = [i for i in range(len(PROMPTS)) if wide[i] != narrow[i]]
    assert changed
    for i in changed:
        assert per_token(PROMPTS[i], wide[i]) > per_token(PROMPTS[i], narrow[i])


def test_progress_counts_prompts(model: PreTrainedModel, tokenizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    generate_texts(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, progress=lambda *done: calls.append(done))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_dropout_is_off_and_the_mode_stays(model: PreTrainedModel, tokenizer: Any) -> None:
    expected = generate_texts(model, tokenizer, PROMPTS, max_new_tokens=TOKENS)
    assert not model.training
    noisy = copy.deepcopy(model).train()
    for module in noisy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    assert generate_texts(noisy, tokenizer, PROMPTS, max_new_tokens=TOKENS) == expected
    assert noisy.training


def test_no_prompts_no_texts(model: PreTrainedModel, tokenizer: Any) -> None:
    assert generate_texts(model, tokenizer, [], max_new_tokens=1) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["A"], {"max_new_tokens": 0}, "max_new_tokens >= 1, found 0"),
        (["A"], {"batch_size": 0}, "batch_size >= 1, found 0"),
        (["A"], {"num_beams": 0}, "num_beams >= 1, found 0"),
        (["A", ""], {}, "found prompt 1 without any"),
        (["A"], {"max_new_tokens": 192}, "within the model's 192 positions, found a prompt of 1 tokens"),
    ],
)
def test_wrong_input_is_refused(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_texts(model, tokenizer, prompts, **{"max_new_tokens": 4, **options})


def test_tokenizer_without_end_token_is_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"an end token, found none\. Set tokenizer\.eos_token"):
        generate_texts(model, tokenizer, PROMPTS, max_new_tokens=1)
