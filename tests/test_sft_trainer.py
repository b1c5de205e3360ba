"""The app `simulations/finetune` with one client and TRL's `SFTTrainer` learn the same of the same file, step by step.

Run with trl 1.16.0, transformers 5.24.0, peft 0.21.2; trl is a dependency of the tests alone. TRL prepares the data,
makes the batches, takes the loss and steps; it is given the order of the rows and the adapters' first values, which
are seeds here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

from hsplit_flwr.common.seeds import derive_seed, head_seed, tail_seed
from hsplit_flwr.flower.apps import message_strategy
from hsplit_flwr.flower.finetune.data import server_data
from hsplit_flwr.lora.factors import init_lora_A
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import block_of, segment_from_model
from tests.helpers.chats import MARKED, tokenizer, write_lines
from tests.helpers.finetune_app import app_config, client_app, context, server_side
from tests.helpers.grid import ThreadGrid

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS, BATCH, CUT, RANK, ALPHA, RATE = 20, 4, 3, 4, 8.0, 5e-3
TOLERANCE = 1e-4
"""largest absolute difference of a step's loss, fp32"""
FOODS = ("Thai", "Greek", "French", "Korean", "Indian")


def chats() -> list[dict[str, Any]]:
    """44 chats, 4 of which are held out."""
    rows = []
    for number in range(44):
        said = f"Number {number} serves {FOODS[number % 5]} food" + " and more" * (number % 4) + "."
        asked = [{"role": "user", "content": f"What about place {number}?"}, {"role": "assistant", "content": said}]
        more = [
            {"role": "user", "content": "Is it cheap?"},
            {"role": "assistant", "content": "Yes." * (number % 3 + 1)},
        ]
        rows.append({"messages": asked + more * (number % 2)})
    return rows


def pairs() -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"name[{n}], food[{FOODS[n % 5]}] =>",
            "completion": f" Number {n} serves {FOODS[n % 5]} food." * (1 + n % 2),
        }
        for n in range(44)
    ]


def tiny_llama(folder: Path) -> str:
    """A random LLaMA with a tokenizer and its chat template.

    Not GPT-2: for a class that is not called ...ForCausalLM, transformers 5.24 counts the first token of every row as
    one to predict, and divides by too much where it has a label.
    """
    own = tokenizer(MARKED)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(own),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


class Losses(TrainerCallback):  # type: ignore[misc]
    """What the trainer logs of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.found.append(logs["loss"])


def by_trl(config: dict[str, Any], folder: Path, **options: Any) -> list[float]:
    """Losses of 20 steps of `SFTTrainer` on the rows that the app's one client has, in the order of its epochs."""
    own = server_data(config)
    assert own
    examples = own.part(0, 1)
    batches = own.training_batches(examples)
    assert len(batches.rows) == len(examples)
    order = [row for epoch in range(STEPS * BATCH // len(examples) + 1) for row in batches.epoch(epoch)]
    rows = [dict(examples[row].columns) for row in order[: STEPS * BATCH]]
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    names = LoraSpec().targets(segment_from_model(model).linear_modules())
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM")
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        max_grad_norm=0.0,
        weight_decay=0.0,
        optim="adamw_torch",
        logging_steps=1,
        train_sampling_strategy="sequential",
        max_length=config["max-length"],
        **options,
    )
    losses = Losses()
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(MARKED),
        peft_config=lora,
        callbacks=[losses],
    )
    for key, parameter in trainer.model.named_parameters():
        if "lora_A" in key:
            module = key.removeprefix("base_model.model.").split(".lora_")[0]
            head = block_of(module) < CUT
            seed = head_seed(0, 1, "0", False) if head else tail_seed(0, 1)
            parameter.data = init_lora_A(parameter.shape[0], parameter.shape[1], derive_seed(seed, module))
    trainer.train()
    return losses.found


def by_us(config: dict[str, Any]) -> list[float]:
    """Losses of 20 steps of the app: its server, its one client, gRPC between them."""
    grid = ThreadGrid({1: client_app.app})
    grid.nodes[1].context = context(config, {"partition-id": 0, "num-partitions": 1}, RecordDict())
    strategy = message_strategy(server_side(config))
    strategy.start(grid)
    (record,) = strategy.history
    assert record.steps
    return list(record.steps.losses)


@pytest.mark.parametrize(
    ("rows", "loss_on", "options"),
    [
        (chats(), "assistant", {"assistant_only_loss": True}),
        (chats(), "all", {}),
        (pairs(), "completion", {}),
    ],
    ids=["assistant turns", "whole chats", "completions"],
)
def test_losses_equal_those_of_sft_trainer(
    rows: list[dict[str, Any]], loss_on: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = {
        **app_config(),
        "model": tiny_llama(tmp_path / "llama"),
        "data": write_lines(tmp_path / "own.jsonl", rows),
        "loss-on": loss_on,
        "max-length": 64,
        "too-long": "cut",
        "cuts": str(CUT),
        "ranks": str(RANK),
        "tail-rank": RANK,
        "lora-alpha": ALPHA,
        "rounds": 1,
        "local-steps": STEPS,
        "batch-size": BATCH,
        "learning-rate": RATE,
        "warmup-steps": 0,
        "max-grad-norm": 0.0,
        "output-dir": str(tmp_path / "out"),
    }
    expected = by_trl(config, tmp_path, **options)
    found = by_us(config)
    assert len(expected) == STEPS
    print(f"largest difference: {max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e}")
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert expected[-1] < 0.7 * expected[0]
