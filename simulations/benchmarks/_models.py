"""The real models that benchmarks run on, by name."""

from collections.abc import Callable

from hsplit_flwr.models.assets import smollm2_checkpoint, tiny_checkpoint

MODELS: dict[str, Callable[[], str]] = {
    "tiny-gpt2": lambda: str(tiny_checkpoint()),
    "smollm2-135m": lambda: str(smollm2_checkpoint()),
}


def source_of(model: str) -> str:
    """Where the model of this name is, or the folder that `model` names."""
    return MODELS[model]() if model in MODELS else model
