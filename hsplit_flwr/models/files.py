"""The files of a model, and one tensor of them at a time.

A hub name, a local folder or a ``.gguf`` file all become a folder with ``config.json``, safetensors and
tokenizer files. Tensors go by the names of the model's own ``state_dict``, whatever the checkpoint calls
them.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hsplit_flwr.errors import ConfigError, HSplitError, UnsupportedModelError
from hsplit_flwr.models.block_layout import build_skeleton
from hsplit_flwr.models.gguf_cache import convert_once
from hsplit_flwr.models.tensor_files import stored_tensors
from hsplit_flwr.models.token_limits import TokenLimits

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_CHUNK_ELEMENTS = 2**21
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelFiles:
    """A folder with ``config.json`` and safetensors, single or sharded with an index.

    Tensors that are read without conversion are views of the mapped file: they cost memory as they are used.
    Replace the file rather than overwrite it while such a view lives.

    Raises:
        ConfigError: no such folder, no config in it, an adapter beside the model, or broken files.
        UnsupportedModelError: no safetensors in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"Expected a folder with config.json, found none in {folder}. "
                "Name a folder written by save_pretrained, a .gguf file or a model of the hub."
            )
        refuse_adapter(folder)
        self._stored = stored_tensors(folder)
        self._mapped: dict[Path, Any] = {}

    @classmethod
    def resolve(cls, name: str) -> "ModelFiles":
        """The files of a local folder, a ``.gguf`` file (converted once into a cache) or a model of the hub.

        The hub is asked only for what its local cache does not hold.

        Raises:
            ConfigError: nothing is found under that name.
            UnsupportedModelError: found, but without safetensors.
        """
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            return cls(convert_once(path))
        if path.is_dir():
            return cls(path)
        return cls(_from_hub(name))

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of the whole model."""
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder)
        return config

    def generation_config(self) -> GenerationConfig | None:
        """How the checkpoint says that texts are written (end tokens, penalties); None if it says nothing."""
        if not (self.folder / GENERATION_CONFIG).is_file():
            return None
        generation: GenerationConfig = GenerationConfig.from_pretrained(self.folder)
        return generation

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        return tokenizer

    def skeleton(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model without its parameters, see `build_skeleton`. A new one at each call.

        Raises:
            UnsupportedModelError: not a decoder-only causal language model.
        """
        skeleton = build_skeleton(self.config, dtype)
        if "stored_names" not in self.__dict__:
            self.stored_names = self._match(skeleton)
        return skeleton

    @cached_property
    def max_positions(self) -> int | None:
        """The longest row of tokens that the model takes; None where nothing ends (rotary embeddings, ALiBi)."""
        return TokenLimits.of(self.skeleton()).positions

    @cached_property
    def stored_names(self) -> dict[str, str]:
        """State-dict name -> name in the checkpoint, of the tensors found there; tied ones by each name."""
        return self._match(self.skeleton())

    def weight_names(self) -> list[str]:
        """State-dict names of the tensors in the checkpoint, in the model's order, each tied tensor once."""
        once: dict[str, str] = {}
        for name, stored in self.stored_names.items():
            once.setdefault(stored, name)
        return list(once.values())

    def _match(self, skeleton: PreTrainedModel) -> dict[str, str]:
        names = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        found: dict[str, str] = {}
        for stored, renamed in _renamed_keys(skeleton, self._stored):
            # A checkpoint of the bare model lacks the prefix.
            prefix = f"{skeleton.base_model_prefix}."
            for name in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
                if name in names:
                    self._require_shape(name, stored, names[name])
                    found[name] = stored
                    break
        ties: Mapping[str, str] = skeleton.all_tied_weights_keys
        for alias, source in ties.items():
            if alias in found and source in found:
                self._require_equal(alias, found[alias], source, found[source])
                found[alias] = found[source]
            elif alias in found:
                found[source] = found[alias]
            elif source in found:
                found[alias] = found[source]
        return {name: found[name] for name in names if name in found}

    def _require_shape(self, name: str, stored: str, expected: tuple[int, ...]) -> None:
        tensor = self._stored[stored]
        if tensor.shape != expected:
            raise ConfigError(
                f"Expected {name} of the shape {expected}, as config.json makes the model, found {tensor.shape} in "
                f"{tensor.file}. Take config.json and weights of one checkpoint (its vocab_size and widths)."
            )

    def _require_equal(self, alias: str, stored_alias: str, source: str, stored_source: str) -> None:
        first, second = self._stored[stored_alias].file, self._stored[stored_source].file
        with safe_open(first, framework="pt") as one, safe_open(second, framework="pt") as other:
            if not torch.equal(one.get_tensor(stored_alias), other.get_tensor(stored_source)):
                raise UnsupportedModelError(
                    f"Expected {alias} to equal {source}, to which config.json ties it, found different values "
                    f"in {self.folder}. Set tie_word_embeddings to false there."
                )

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor of the base weights W_0, on the CPU; under any name of a tied one.

        With `dtype` None or the stored one, a view of the mapped file: treat it as read-only. Otherwise a copy.

        Raises:
            UnsupportedModelError: the checkpoint has no such tensor.
        """
        stored = self.stored_names.get(name)
        if stored is None:
            raise UnsupportedModelError(
                f"Expected a tensor for {name!r} in {self.folder}, found none of that name. "
                "Use a checkpoint of this model class whose tensors transformers loads one to one, not a quantised one."
            )
        path = self._stored[stored].file
        mapped = self._open(path)
        stored_dtype = _TORCH_DTYPES.get(mapped.get_slice(stored).get_dtype())
        if dtype is None or stored_dtype in (None, dtype):
            view: Tensor = mapped.get_tensor(stored)
            return view
        return _read_converted(path, stored, dtype)

    def _open(self, path: Path) -> Any:
        if path not in self._mapped:
            self._mapped[path] = safe_open(path, framework="pt")
        return self._mapped[path]


def _renamed_keys(skeleton: PreTrainedModel, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Checkpoint key -> what transformers calls it today: GPT-NeoX's ``embed_out`` is now ``lm_head``."""
    renamings = [rule for rule in get_model_conversion_mapping(skeleton) if isinstance(rule, WeightRenaming)]
    for key in keys:
        renamed = key
        for rule in renamings:
            renamed, _ = rule.rename_source_key(renamed)
        yield key, renamed


def _read_converted(path: Path, stored: str, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype`, through one short-lived mapping per chunk: the pages it touched go back to the system."""
    with safe_open(path, framework="pt") as file:
        shape = file.get_slice(stored).get_shape()
        if not shape:
            return file.get_tensor(stored).to(dtype)  # type: ignore[no-any-return]
    converted = torch.empty(shape, dtype=dtype)
    rows = max(1, _CHUNK_ELEMENTS * shape[0] // max(1, converted.numel()))
    for first in range(0, shape[0], rows):
        with safe_open(path, framework="pt") as brief:
            converted[first : first + rows] = brief.get_slice(stored)[first : first + rows]
    return converted


def refuse_adapter(folder: Path) -> None:
    """Raises ConfigError if `folder` holds an adapter beside its model: transformers would apply it, we would not."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"Expected a model alone in {folder}, found the adapter of {ADAPTER_CONFIG} beside it. Merge it first "
            "(PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)), or remove its files to train "
            "the model without it."
        )


def _from_hub(name: str) -> Path:
    wanted: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*"]}
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **wanted))
        if _is_complete(folder):
            return folder
    except HFValidationError as error:
        raise _not_found(name) from error
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(name, **wanted))
    # The hub client raises its own, requests', httpx' and OSErrors for "not there" and "not reachable".
    except Exception as error:
        raise _not_found(name) from error


def _is_complete(folder: Path) -> bool:
    try:
        stored_tensors(folder)
    except HSplitError:
        return False
    return (folder / "config.json").is_file()


def _not_found(name: str) -> ConfigError:
    return ConfigError(
        f"Expected a local folder, a .gguf file or a model of the hub, found nothing under {name!r}. "
        "Check the path, or the name and the connection to the hub."
    )
