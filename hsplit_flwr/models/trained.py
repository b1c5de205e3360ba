"""What a run left, or any model, whole and ready to be asked: a merged model, a PEFT adapter on its base, a base."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.files import ADAPTER_CONFIG, ModelFiles
from hsplit_flwr.models.quantized import Quantization
from hsplit_flwr.models.segments import load_segment


def load_trained(name: str, *, device: str = "cpu", base: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and eval mode, and its tokenizer. The adapter of a quantised base stands beside that.

    Args:
        name: a folder with a PEFT adapter, or whatever `ModelFiles.resolve` takes.
        device: where it computes.
        base: the model that the adapter is for; empty: the one that it names.

    Raises:
        ConfigError: nothing is found under a name, or an adapter that names no base or does not fit it.
        UnsupportedModelError: found, but without safetensors.
    """
    folder = Path(name).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        model, tokenizer = _adapted(folder, base or _base_of(folder))
    else:
        files = ModelFiles.resolve(name)
        model, tokenizer = _whole(files), files.tokenizer()
    return model.to(device).eval(), tokenizer


def _whole(files: ModelFiles) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    return model


def _base_of(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"Expected {ADAPTER_CONFIG} in {folder} to name its base model, found: {error!r}.") from error
    if not isinstance(base, str) or not base:
        raise ConfigError(f"Expected {ADAPTER_CONFIG} in {folder} to name its base model, found {base!r}. Give --base.")
    return base


def _adapted(folder: Path, base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The adapter merged into its base: it computes the same, and generates faster. Or beside it, if quantised."""
    from peft import PeftModel

    files = ModelFiles.resolve(base)
    quantization = Quantization.of_folder(folder)
    try:
        if quantization:
            whole = load_segment(ModelFiles(files.folder, quantization)).model
            model: PreTrainedModel = PeftModel.from_pretrained(whole, folder)
        else:
            model = PeftModel.from_pretrained(_whole(files), folder).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"Expected a PEFT adapter for {base} in {folder}, found: {str(error)[:300]} Give the model that it was "
            "trained on (--base)."
        ) from error
    own = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder) if own else files.tokenizer()
