import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsplit_flwr.data.restaurants import restaurant_examples
from hsplit_flwr.data.text_batches import TextBatches
from hsplit_flwr.data.token_row import IGNORE
from hsplit_flwr.models.assets import tiny_checkpoint

FOLDER = tiny_checkpoint()
MAX_BYTES = 5_000_000
OWN_TEXT_PERPLEXITY = 3.35
START_PERPLEXITY = 2432.0
RELATIVE_TOLERANCE = 0.02
"""Of a perplexity, between CPUs and library versions"""


@pytest.fixture(scope="module")
def general_text() -> ModuleType:
    path = Path(__file__).parents[2] / "simulations" / "general_text.py"
    spec = importlib.util.spec_from_file_location("general_text", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def sum_nll(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed negative log likelihood and number of the target tokens of a batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    nll = cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")
    return nll, int((labels != IGNORE).sum())


@torch.no_grad()
def target_perplexity(model: Any, batches: TextBatches) -> float:
    sums = [sum_nll(model, batch) for batch in batches]
    return math.exp(sum(float(nll) for nll, _ in sums) / sum(count for _, count in sums))


def test_folder_is_complete_small_and_free_of_pickles() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "SHA256",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_content_is_what_the_hash_file_pins() -> None:
    content = (FOLDER / "model.safetensors").read_bytes() + (FOLDER / "tokenizer.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == (FOLDER / "SHA256").read_text().strip()


def test_architecture_allows_five_cuts(model: Any) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model_type"], config["n_layer"], config["n_positions"]) == ("gpt2", 8, 192)
    assert config["tie_word_embeddings"] is True
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_tokenizer_gives_every_text_back(tokenizer: Any, general_text: ModuleType) -> None:
    train, held_out = restaurant_examples()
    texts = [text for example in train + held_out for text in (example.mr, example.ref)]
    texts += [*islice(general_text.documents(7), 200), "Café 12 – ü\n\ttabs  and {signs}"]
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_every_restaurant_example_fits_in_96_tokens(tokenizer: Any) -> None:
    train, held_out = restaurant_examples()
    assert TextBatches(train + held_out, tokenizer, batch_size=8, max_length=96).truncated == 0


def test_pretraining_text_has_no_restaurant_sentence(general_text: ModuleType) -> None:
    def sentences(texts: Iterator[str]) -> set[str]:
        return {part for text in texts for part in re.split(r"(?<=[.?]) ", text.rpartition(" => ")[2])}

    train, held_out = restaurant_examples()
    learnt = sentences(islice(general_text.documents(1), 20_000))
    assert len(learnt) > 10_000
    assert not learnt & sentences(example.ref for example in train + held_out)


def test_it_is_a_language_model_of_its_own_text(model: Any, tokenizer: Any, general_text: ModuleType) -> None:
    """Perplexity on documents of a seed that pretraining did not use (1,536 tokens: untrained 1,536)."""
    ids = [
        token
        for text in islice(general_text.documents(99), 400)
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    rows = torch.tensor(ids[: 64 * 192]).view(64, 192)
    with torch.no_grad():
        nll = cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert nll.exp().item() == pytest.approx(OWN_TEXT_PERPLEXITY, rel=RELATIVE_TOLERANCE)


def test_a_few_lora_steps_learn_the_restaurants(model: Any, tokenizer: Any) -> None:
    """20 steps of PEFT at the recommended rate: far more than the 25 % that a federated run has to gain."""
    from peft import LoraConfig, get_peft_model

    train, held_out = restaurant_examples()
    scored = TextBatches(held_out[::4], tokenizer, batch_size=40, max_length=96, shuffle=False)
    start = target_perplexity(model, scored)
    assert start == pytest.approx(START_PERPLEXITY, rel=RELATIVE_TOLERANCE)

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", fan_in_fan_out=True))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    for batch in islice(TextBatches(train, tokenizer, batch_size=8, max_length=96).stream(), 20):
        nll, count = sum_nll(tuned, batch)
        optimizer.zero_grad()
        (nll / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert target_perplexity(tuned, scored) < 0.5 * start
