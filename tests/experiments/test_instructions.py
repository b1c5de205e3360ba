"""Instruction data of a run: whose rows they are, what is learned of them, and that methods train on them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hsplit_flwr.data.assets import DESK
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.engine import run
from hsplit_flwr.experiments.experiment_file import read_experiment
from hsplit_flwr.experiments.main import SETTING_NAMES
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import RunSpec
from hsplit_flwr.experiments.task import Task

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = RunSpec("hsplitlora", "flowertune", "iid", 0, 0.01, data="desk", rounds=1, local_steps=1, eval_examples=6)


def answers(path: Path) -> list[str]:
    """Everything that the assistant says in the chats of a file."""
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]


def test_twenty_clients_share_the_desk_and_learn_answers_alone() -> None:
    task = Task.of(SPEC)
    tokenizer = task.files.tokenizer()
    assert list(task.streams) == [str(client) for client in range(20)]
    seen: set[tuple[int, ...]] = set()
    learned = []
    for stream in task.streams.values():
        batches = stream(0)
        own = set()
        for _ in range(3):  # 12 chats, four at a time: one epoch
            batch = next(batches)
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                own.add(tuple(ids[: task.spec.max_length].tolist()))
                learned.append(tokenizer.decode(labels[labels >= 0], skip_special_tokens=True))
        assert not own & seen, "a chat is of two clients"
        seen |= own
    said = "".join(answers(DESK)).replace(" ", "")
    assert all(learned)
    openings = [text.replace(" ", "")[:20] for text in learned]
    assert all(opening in said for opening in openings)


def test_halves_of_the_held_out_chats_are_apart() -> None:
    def rows(half: str) -> set[tuple[int, ...]]:
        batches = Task.of(replace(SPEC, held_out=half, eval_examples=100)).eval_batches
        return {tuple(row.tolist()) for batch in batches for row in batch["input_ids"]}

    test, validation = rows("test"), rows("validation")
    assert test
    assert validation
    assert not test & validation


def test_ones_own_file_is_divided_and_held_out(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"It is the {n}."} for n in ("cat", "dog", "sun", "moon") * 15]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = tmp_path / "own.toml"
    text = (REPOSITORY / "simulations/evidence/flowertune.toml").read_text()
    experiment.write_text(text.replace('data = "desk"', 'data = "own.jsonl"'))
    spec = read_experiment(experiment, METHODS, SETTING_NAMES)[0]
    assert spec.data == str(own)
    task = Task.of(spec)
    assert len(task.streams) == 20
    assert sum(len(batch["labels"]) for batch in task.eval_batches) == 6  # half of a fifth of 60


def test_text_metrics_of_answers_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected text_prompts = 0 with the instruction data desk, found 5"):
        Task.of(replace(SPEC, text_prompts=5))
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        Task.of(replace(SPEC, data=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize("method", ["hsplitlora", "splitlora_16", "hetlora", "flora", "ft"])
def test_every_method_of_the_file_trains_four_of_twenty(method: str) -> None:
    torch.manual_seed(0)
    before, after = run(replace(SPEC, method=method)).evaluations
    assert after.clients == 4
    assert after.tokens > 0
    assert math.isfinite(after.perplexity)
    assert after.perplexity != before.perplexity
