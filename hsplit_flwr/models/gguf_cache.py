"""A GGUF checkpoint, converted once per machine into a folder that transformers reads piece by piece.

GGUF tensors are quantised, permuted and named for llama.cpp; only a whole-model load undoes that. It happens
here, so that every later load of a segment reads its own tensors only.
"""

import copy
import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout

from hsplit_flwr.common.cache_folder import cache_folder
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.block_layout import parameters_on_meta
from hsplit_flwr.models.gguf_rope import FREQUENCIES, read_rope
from hsplit_flwr.models.gguf_tokenizer import cut_words_as

CONVERSION_LIMIT_S = 1800.0
"""how long to wait for another process that converts the same file"""

FORMAT = 3
"""of converted folders; since 2 words are cut as the file says, since 3 angles are scaled as it says"""

_KEYS_LEFT_OUT = {"gpt2.context_length": "n_positions", "qwen3.attention.key_length": "head_dim"}
_READS_ROPE = frozenset(["gpt-oss"])
"""architectures whose scaled positions transformers reads"""

_log = logging.getLogger(__name__)


def convert_once(gguf: Path) -> Path:
    """The folder with the converted `gguf`: float32 safetensors, config and tokenizer.

    Any number of processes may ask at once: one converts, which takes the memory of the whole model and more;
    the others wait for it.

    Raises:
        UnsupportedModelError: transformers cannot read it.
        ConfigError: no such file, the package gguf is missing, or another process converts for too long.
    """
    if not gguf.is_file():
        raise ConfigError(f"Expected a GGUF file, found none at {gguf}. Check the path.")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / f"{gguf.stem}-{digest[:16]}-{FORMAT}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=CONVERSION_LIMIT_S):
            if not folder.is_dir():
                _convert(gguf, folder)
    except Timeout as error:
        raise ConfigError(
            f"Expected the conversion of {gguf} within {CONVERSION_LIMIT_S:.0f} s, found {folder}.lock "
            "still held. End the process that holds it."
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    _log.warning("Converting %s once into %s; later starts skip this.", gguf.name, folder)
    # Renamed at the end: a folder under its final name is complete, whatever happens to this process.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
        unfinished = Path(temporary) / "model"
        _dequantised(gguf).save_pretrained(unfinished)
        _tokenizer(gguf).save_pretrained(unfinished)
        unfinished.rename(folder)


def _tokenizer(gguf: Path) -> transformers.PreTrainedTokenizerBase:
    """The file's, which cuts words as the file says; transformers takes GPT-2's way for most."""
    from gguf import GGUFReader

    tokenizer: transformers.PreTrainedTokenizerBase
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    said = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if said and not cut_words_as(tokenizer, name := str(said.contents())):
        _log.warning(
            "%s says that words are cut as %r, which is not known here: what is trained on may be other tokens than "
            "the model knows, of numbers above all. Use a safetensors checkpoint of the model.", gguf.name, name
        )  # fmt: skip
    return tokenizer


def unread_settings(path: Path) -> dict[str, Any]:
    """What the file says and transformers does not read: positions of GPT-2, Qwen3's width of heads, scaled angles."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    found = {config_key: said.get(key) for key, config_key in _KEYS_LEFT_OUT.items()}
    if said["general.architecture"] not in _READS_ROPE:
        divisors = next((torch.tensor(t.data) for t in reader.tensors if t.name == FREQUENCIES), None)
        found["rope_parameters"] = read_rope(said, divisors)
    return {key: value for key, value in found.items() if value is not None}


def _dequantised(gguf: Path) -> transformers.PreTrainedModel:
    """The float32 model of a GGUF file, as an ordinary model that can be saved."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options, **unread_settings(gguf))
    except ImportError as error:
        raise ConfigError(
            f"Expected the package gguf to read {gguf}, found none. Run: pip install 'hsplit_flwr[e2e]'."
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"Expected a GGUF file of a causal language model that transformers supports, found {gguf}. "
            f"Use a safetensors checkpoint of the model. ({error})"
        ) from error
    config = copy.deepcopy(loaded.config)
    vars(config).pop("quantization_config", None)
    with parameters_on_meta():
        plain: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain
