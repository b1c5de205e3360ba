"""Files that ship with the package: ``tiny-gpt2``, a small pretrained GPT-2 that needs no download."""

from importlib.resources import files
from pathlib import Path


def tiny_checkpoint() -> Path:
    """The folder of the tiny GPT-2 (8 blocks, hidden size 96, 192 positions, float32) with its tokenizer.

    It knows English of many topics except restaurants, so `hsplit_flwr.restaurants` is something to learn.
    ``python -m simulations.make_tiny_checkpoint`` makes it again; ``SHA256`` there pins its content.
    """
    return Path(str(files(__name__) / "tiny-gpt2"))
