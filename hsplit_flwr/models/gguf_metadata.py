"""What a GGUF file says beside its tensors: made of config and tokenizer, or copied of the base's own file."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.models.gguf_layouts import Layout
from hsplit_flwr.models.gguf_rope import read_rope
from hsplit_flwr.models.gguf_tokenizer import tokenizer_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HOW = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
"""keys that say how a file is written; each file has its own"""
CUT = "tokenizer.ggml.pre"
MATTERS = ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
"""of a tokenizer, what two files of one model have alike"""

_log = logging.getLogger("hsplit_flwr")


def write_metadata(
    writer: Any, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", layout: Layout, *, name: str
) -> None:
    """Give `writer` (a ``gguf.GGUFWriter``) what there is to say of a model called `name`.

    Raises:
        UnsupportedModelError: see `Layout.figures` and `tokenizer_figures`.
    """
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    writer.add_type("model")
    writer.add_name(name)
    for key, value in _said(model, tokenizer, layout).items():
        kinds[type(value)](key, value)


def copy_metadata(
    writer: Any, like: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", layout: Layout
) -> None:
    """Give `writer` what the GGUF file `like` says, if it is of such a model.

    Raises:
        ConfigError: it is not: another architecture, other figures or other tokens.
        UnsupportedModelError: see `Layout.figures` and `tokenizer_figures`.
    """
    import gguf

    try:
        fields = gguf.GGUFReader(like).fields
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected the GGUF file of the base at {like}, found: {error}.") from error
    _require_alike(like, fields, {"general.architecture": layout.architecture, **_said(model, tokenizer, layout)})
    for key, field in fields.items():
        if not key.startswith(HOW):
            items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=items)


def _said(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", layout: Layout) -> dict[str, Any]:
    figures = {f"{layout.architecture}.{key}": value for key, value in layout.figures(model.config).items()}
    about = tokenizer_figures(tokenizer, model.config.vocab_size)
    return {**figures, **{f"tokenizer.{key}": value for key, value in about.items()}}


def _require_alike(like: Path, fields: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Figures and tokens that both sides state are the same; a tokenizer that cuts words otherwise is told of.

    Scaled positions are the same also where one side states none: a file without them is of a shorter context.
    """
    for key, value in said.items():
        if key not in fields or (key.startswith("tokenizer.") and key not in (*MATTERS, CUT)):
            continue
        told = fields[key].contents()
        if _alike(told, value):
            continue
        if key == CUT:
            _log.warning(
                "words are cut as %s by %s and as %s by the model's tokenizer: the file's way is taken, with which "
                "some texts are other tokens than in training. Without --like it is the tokenizer's.",
                *(told, like, value),
            )
            continue
        raise ConfigError(
            f"Expected the GGUF file of the model's base, found {key} = {_short(told)} in {like} where the model has "
            f"{_short(value)}. Give the right file, or none."
        )
    figures = {key: field.contents() for key, field in fields.items() if not key.startswith("tokenizer.")}
    told_rope = read_rope(figures, None)
    if not _alike(told_rope, own_rope := read_rope(said, None)):
        raise ConfigError(
            f"Expected the GGUF file of the model's base, found positions {told_rope or 'as they are'} in {like} where "
            f"the model has {own_rope or 'them as they are'}. Give the right file, or none."
        )


def _alike(told: Any, value: Any) -> bool:
    """Whether they are the same, as far as a file's float32 says."""
    if isinstance(value, dict) and isinstance(told, dict):
        return told.keys() == value.keys() and all(_alike(told[key], value[key]) for key in value)
    return bool(told == value or (isinstance(value, float) and math.isclose(told, value, rel_tol=1e-6)))


def _short(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else repr(value)
