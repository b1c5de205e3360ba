"""A whole model as a GGUF file, which llama.cpp and what is built on it read.

The file is read back before it gets its name, and every tensor compared with what was to be written.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsplit_flwr.errors import ConfigError, UnsupportedModelError
from hsplit_flwr.models.gguf_layouts import Layout, layout_of
from hsplit_flwr.models.gguf_metadata import copy_metadata, write_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""as people type it -> GGUF's type of matrices; vectors are float32, as llama.cpp wants them"""
FILE_TYPES = {"fp32": 0, "fp16": 1, "bf16": 32}
"""llama.cpp's numbers of them"""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_gguf(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    path: Path,
    *,
    dtype: str = "fp32",
    like: Path | None = None,
) -> None:
    """Write `model` and `tokenizer` to `path`.

    Args:
        model: a whole causal language model, without adapters, in a float dtype.
        tokenizer: its own.
        path: of the file; one that is there is replaced.
        dtype: of matrices, one of `TYPES`.
        like: the GGUF file of the model's base, whose metadata (name, license, tokenizer, chat template) are taken;
            None: they are made of config and tokenizer.

    Raises:
        ConfigError: the package gguf is missing, `like` is not of such a model, a weight does not fit `dtype`, or the
            file cannot be written.
        UnsupportedModelError: a model type, config or tokenizer with which llama.cpp would compute something else.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("Expected the package gguf, found none. Run: pip install 'hsplit_flwr[finetune]'.") from error
    if dtype not in TYPES:
        raise ConfigError(f"Expected a dtype of {', '.join(TYPES)}, found {dtype!r}.")
    layout = layout_of(model.config)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(unfinished, layout.architecture)
        writer.add_file_type(FILE_TYPES[dtype])
        if like is None:
            write_metadata(writer, model, tokenizer, layout, name=path.stem)
        else:
            copy_metadata(writer, like, model, tokenizer, layout)
        for name, array, kind in _arrays(model, layout, dtype):
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _compare(unfinished, model, layout, dtype)
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"Expected a GGUF file that can be written at {path}, found: {error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _arrays(model: "PreTrainedModel", layout: Layout, dtype: str) -> Iterator[tuple[str, NDArray[Any], Any]]:
    """Every tensor by llama.cpp's name, as it is stored, and its type there; tied ones once."""
    import gguf

    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, tensor in layout.further(model.config):
        yield name, _stored(name, tensor, "F32"), gguf.GGMLQuantizationType.F32
    tied = set(model.all_tied_weights_keys)
    for name, weight in model.state_dict().items():
        if name in tied:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"Expected float weights that llama.cpp has a place for, found {name} ({weight.dtype}). Merge adapters "
                "and dequantise weights before."
            )
        kind = TYPES[dtype] if weight.ndim > 1 else "F32"
        array = _stored(name, layout.arranged(name, weight.detach(), model.config), kind)
        yield found, array, gguf.GGMLQuantizationType[kind]


def _stored(name: str, weight: Tensor, kind: str) -> NDArray[Any]:
    """`weight` rounded to the nearest of `kind`; bfloat16, which numpy lacks, as bytes."""
    rounded = weight.to("cpu", _DTYPES[kind]).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise ConfigError(
            f"Expected weights that fit {kind}, found values of {name} that do not, or that are no numbers. Take "
            "--dtype bf16 or fp32."
        )
    array: NDArray[Any] = rounded.view(torch.uint8).numpy() if kind == "BF16" else rounded.numpy()
    return array


def _compare(path: Path, model: "PreTrainedModel", layout: Layout, dtype: str) -> None:
    """Raises OSError where the file at `path` does not hold what was to be written."""
    import gguf

    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, array, kind in _arrays(model, layout, dtype):
        found = read.pop(name)
        if found.tensor_type != kind or not np.array_equal(found.data, array):
            raise OSError(f"{name} is read back otherwise than it was written")
    if read:
        raise OSError(f"{len(read)} tensors that nobody wrote are read back")
