"""The files of a model, and one tensor of them at a time.

A hub name, a local folder or a ``.gguf`` file all become a folder with ``config.json``, safetensors and
tokenizer files. Tensors go by the names of the model's own ``state_dict``, whatever the checkpoint calls
them.
"""

import copy
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
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
from transformers import __version__ as transformers_version

from hsplit_flwr.common.checks import require
from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.block_layout import build_skeleton
from hsplit_flwr.models.conversions import Parameters, Source, converted, sources_of
from hsplit_flwr.models.gguf_cache import convert_once
from hsplit_flwr.models.hub import hub_folder
from hsplit_flwr.models.quantized import Quantization, plain_config, statistics_of
from hsplit_flwr.models.tensor_files import StoredTensor, stored_tensors
from hsplit_flwr.models.token_limits import TokenLimits

ADAPTER_CONFIG = "adapter_config.json"
ATTENTIONS = AUTO, *_ = ("auto", "sdpa", "eager")
GENERATION_CONFIG = "generation_config.json"
_CHUNK_ELEMENTS = 2**21
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_log = logging.getLogger("hsplit_flwr")


class ModelFiles:
    """A folder with ``config.json`` and safetensors, single or sharded with an index.

    Tensors that are read without conversion are views of the mapped file: they cost memory as they are used.
    Replace the file rather than overwrite it while such a view lives.

    Args:
        folder: where they are.
        quantization: how the linear layers are held, see `quantized_by`; None: as they are stored.
        attention: transformers' implementation of attention, see `attending_by`; empty: what it chooses.

    Raises:
        ConfigError: no such folder, no config in it, an adapter beside the model, or broken files.
        UnsupportedModelError: no safetensors in it.
    """

    def __init__(self, folder: Path, quantization: Quantization | None = None, attention: str = "") -> None:
        self.folder = folder
        self.quantization = quantization
        self.attention = attention
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"Expected a folder with config.json, found none in {folder}. "
                "Name a folder written by save_pretrained, a .gguf file or a model of the hub."
            )
        refuse_adapter(folder)
        self._stored = stored_tensors(folder)
        self._statistics = statistics_of(self._stored) if quantization else {}
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
        return cls(hub_folder(name))

    def quantized_by(self, method: str) -> "ModelFiles":
        """The same files as a base whose linear layers are held in 4 or 8 bits.

        Args:
            method: one of `models.quantized.METHODS`, or ``none``: as they are stored. Of a checkpoint that is
                quantised by bitsandbytes already, the one that it was quantised by.

        Raises:
            ConfigError: no such method, or the checkpoint is quantised by another.
        """
        return ModelFiles(self.folder, Quantization.chosen(self.config, method), self.attention)

    def attending_by(self, implementation: str) -> "ModelFiles":
        """The same files as a model with that implementation of attention: ``sdpa``, ``eager``, or ``auto``.

        Raises:
            ConfigError: another one: what is not tested here is not offered.
        """
        chosen = implementation in ATTENTIONS
        require(chosen, "attn_implementation", f"as one of {ATTENTIONS}, which are tested here", implementation)
        return ModelFiles(self.folder, self.quantization, "" if implementation == AUTO else implementation)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config of the whole model; of files that are `quantized_by` something, as if it were not.

        Raises:
            ConfigError: config.json is none, or of a model type that transformers does not know.
        """
        config: PretrainedConfig = self._parsed("config.json", AutoConfig)
        if self.quantization and Quantization.of_config(config):
            config = plain_config(config)
        return with_attention(config, self.attention or AUTO)

    def generation_config(self) -> GenerationConfig | None:
        """How the checkpoint says that texts are written (end tokens, penalties); None if it says nothing.

        Raises:
            ConfigError: generation_config.json is none.
        """
        if not (self.folder / GENERATION_CONFIG).is_file():
            return None
        generation: GenerationConfig = self._parsed(GENERATION_CONFIG, GenerationConfig)
        return generation

    def _parsed(self, file: str, kind: Any) -> Any:
        try:
            return kind.from_pretrained(self.folder)
        # transformers raises OSError, ValueError, KeyError and more of its own for what it cannot read.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"Expected {self.folder / file} to be a file that transformers {transformers_version} reads, "
                f"found: {reason:.300}. Download it again, or take a model that this version knows."
            ) from error

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
        if "_sources" not in self.__dict__:
            self._parameters = Parameters(skeleton)
            self._sources = self._match(skeleton)
        return skeleton

    @cached_property
    def max_positions(self) -> int | None:
        """The longest row of tokens that the model takes; None where nothing ends (rotary embeddings, ALiBi)."""
        return TokenLimits.of(self.skeleton()).positions

    @cached_property
    def _parameters(self) -> Parameters:
        return Parameters(self.skeleton())

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """State-dict name -> where it comes from, of the tensors found in the checkpoint; tied ones by each name."""
        return self._match(self.skeleton())

    def __contains__(self, name: object) -> bool:
        """Whether the checkpoint has the tensor of that state-dict name."""
        return name in self._sources

    def weight_names(self) -> list[str]:
        """State-dict names of the tensors in the checkpoint, in the model's order, each tied tensor once."""
        once: dict[Source, str] = {}
        for name, source in self._sources.items():
            once.setdefault(source, name)
        return list(once.values())

    def _match(self, skeleton: PreTrainedModel) -> dict[str, Source]:
        statistics = {stored for named in self._statistics.values() for stored in named.values()}
        found = sources_of(skeleton, self._stored.keys() - statistics)
        for name, source in found.items():
            if self._is_quantized(name, source):
                continue
            for stored in source.stored:
                self._require_floats(stored, self._stored[stored])
            if source.converter is None:
                tensor = self._stored[source.stored[0]]
                self._require_shape(name, tensor.shape, str(tensor.file))
        used = statistics | {stored for source in found.values() for stored in source.stored}
        if unused := sorted(self._stored.keys() - used):
            _log.warning(
                "%d tensors of %s, such as %s, have no place in the model that its config.json describes: they are "
                "left out, as transformers does. Check the number of layers there.",
                len(unused),
                self.folder,
                unused[0],
            )
        ties: Mapping[str, str] = skeleton.all_tied_weights_keys
        for alias, source_name in ties.items():
            if alias in found and source_name in found:
                self._require_equal(alias, found[alias], source_name, found[source_name])
                found[alias] = found[source_name]
            elif alias in found:
                found[source_name] = found[alias]
            elif source_name in found:
                found[alias] = found[source_name]
        return {name: found[name] for name in self._parameters.shapes if name in found}

    def _is_quantized(self, name: str, source: Source) -> bool:
        """Whether the tensor is stored with statistics; its form is looked at where it is loaded."""
        quantized = [stored for stored in source.stored if stored in self._statistics]
        if quantized and source.converter:
            raise UnsupportedModelError(
                f"Expected {name} in one quantised tensor of {self.folder}, found it in {len(source.stored)}, such as "
                f"{quantized[0]}. Take the checkpoint that it was made from, and quantise it here."
            )
        return bool(quantized)

    def _require_shape(self, name: str, shape: tuple[int, ...], where: str) -> None:
        if shape != (expected := self._parameters.shapes[name]):
            raise ConfigError(
                f"Expected {name} of the shape {expected}, as config.json makes the model, found {shape} in "
                f"{where}. Take config.json and weights of one checkpoint (its vocab_size and widths)."
            )

    def _require_floats(self, name: str, tensor: StoredTensor) -> None:
        if tensor.dtype not in _TORCH_DTYPES and len(tensor.shape) > 1:
            raise UnsupportedModelError(
                f"Expected weights in {', '.join(_TORCH_DTYPES)}, found {name} in {tensor.dtype} in {tensor.file}: a "
                "quantised checkpoint whose config.json does not say so. Take the checkpoint that it was made from."
            )

    def _require_equal(self, alias: str, first: Source, source_name: str, second: Source) -> None:
        if not torch.equal(self._made(alias, first, None), self._made(source_name, second, None)):
            raise UnsupportedModelError(
                f"Expected {alias} to equal {source_name}, to which config.json ties it, found different values "
                f"in {self.folder}. Set tie_word_embeddings to false there."
            )

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor of the base weights W_0, on the CPU; under any name of a tied one.

        With `dtype` None or the stored one, a view of the mapped file: treat it as read-only. Otherwise, and where the
        checkpoint stores it in other pieces than the model, a copy. A quantised tensor comes as it is stored, whatever
        `dtype` is: see `statistics`.

        Raises:
            ConfigError: the pieces do not make a tensor of the model's shape.
            UnsupportedModelError: the checkpoint has no such tensor.
        """
        if (source := self._sources.get(name)) is None:
            raise UnsupportedModelError(
                f"Expected a tensor for {name!r} in {self.folder}, found none of that name. "
                "Use a checkpoint of this model class that transformers loads, not a quantised one."
            )
        return self._made(name, source, dtype)

    def statistics(self, name: str) -> dict[str, Tensor]:
        """What a checkpoint stores beside a quantised tensor; empty where it is not quantised."""
        (stored, *_) = self._sources[name].stored
        return {key: self._read_stored(other, None) for key, other in self._statistics.get(stored, {}).items()}

    def _made(self, name: str, source: Source, dtype: torch.dtype | None) -> Tensor:
        if source.converter is None:
            return self._read_stored(source.stored[0], dtype)
        try:
            tensor = converted(source, lambda key: self._read_stored(key, dtype), self._parameters)
        # Whatever transformers' conversion meets: a missing expert, tensors of two widths.
        except Exception as error:
            raise ConfigError(
                f"Expected the tensors that make {name} in {self.folder} ({source.stored[0]}, ..., "
                f"{len(source.stored)} in all), found some that do not fit: {error}. Download the folder again."
            ) from error
        shape = () if tensor is None else tuple(tensor.shape)
        self._require_shape(name, shape, f"what {source.stored[0]}, ... of {self.folder} make")
        assert tensor is not None
        return tensor

    def _read_stored(self, stored: str, dtype: torch.dtype | None) -> Tensor:
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


def with_attention(config: PretrainedConfig, implementation: str) -> PretrainedConfig:
    """The config of a model with that implementation of attention, one of `ATTENTIONS`."""
    if implementation == AUTO:
        return config
    chosen = copy.deepcopy(config)
    chosen._attn_implementation = implementation
    return chosen


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
