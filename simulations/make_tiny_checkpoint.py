"""Pretrain the GPT-2 that ships with the package: ``python -m simulations.make_tiny_checkpoint``.

Trains a byte-level BPE tokenizer and then the model, on the text of `simulations.general_text`, on one CPU
thread, and writes the checkpoint folder with its ``SHA256``. The same machine and library versions give the
same files.
"""

import argparse
import hashlib
import math
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hsplit_flwr.data.restaurants import restaurant_examples
from hsplit_flwr.models.assets import tiny_checkpoint
from simulations.general_text import documents

VOCAB_SIZE, CONTEXT, HIDDEN, BLOCKS, HEADS = 1536, 192, 96, 8, 4
BATCH_SIZE, PEAK_LEARNING_RATE, WARMUP_STEPS = 12, 3e-3, 50
END, PAD = "<|endoftext|>", "<|pad|>"
HASHED_FILES = ("model.safetensors", "tokenizer.json")


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (as GPT-2's) that knows the words of both texts."""
    train, _ = restaurant_examples(seed)
    texts = list(islice(documents(seed), 4000)) + [text for example in train for text in (example.mr, example.ref)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )


def packed_rows(tokenizer: PreTrainedTokenizerFast, num_rows: int, seed: int) -> Tensor:
    """Documents one after another, each closed by the end token, cut into rows of ids (num_rows, CONTEXT)."""
    ids: list[int] = []
    text = documents(seed)
    while len(ids) < num_rows * CONTEXT:
        for encoded in tokenizer(list(islice(text, 1000)))["input_ids"]:
            ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids[: num_rows * CONTEXT]).view(num_rows, CONTEXT)


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """An untrained GPT-2 with tied embeddings, no dropout."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=BLOCKS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def next_token_loss(model: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    """Mean negative log likelihood of every next token of ``rows`` (B, T)."""
    logits = model(rows).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def pretrain(model: GPT2LMHeadModel, rows: Tensor) -> None:
    """One pass over ``rows`` with AdamW, linear warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    batches = torch.split(rows, BATCH_SIZE)
    started = time.monotonic()
    for step, batch in enumerate(batches):
        decay = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min((step + 1) / WARMUP_STEPS, decay)
        loss = next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == len(batches) - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


def checkpoint_hash(folder: Path) -> str:
    """The sha256 over ``HASHED_FILES`` one after another, in hex."""
    digest = hashlib.sha256()
    for name in HASHED_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Tokenizer, pretraining, perplexity on unseen text, files and hash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=tiny_checkpoint(), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of text and weights (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, packed_rows(tokenizer, arguments.steps * BATCH_SIZE, arguments.seed + 1))
    with torch.no_grad():
        loss = next_token_loss(model, packed_rows(tokenizer, 2 * BATCH_SIZE, arguments.seed + 2))
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    (arguments.output / "SHA256").write_text(checkpoint_hash(arguments.output) + "\n", encoding="ascii")
    print(f"perplexity on unseen text of the same kind {loss.exp().item():.2f}")
    print(f"sha256 {checkpoint_hash(arguments.output)}")


if __name__ == "__main__":
    main()
