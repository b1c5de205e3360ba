"""A base whose linear layers are held in 4 or 8 bits: what is quantised, how it is read, what stands beside it.

The quantisation is that of bitsandbytes, and which layers get it is what transformers would choose (all linear layers
but the LM head), so ``from_pretrained(..., quantization_config=quantization.transformers_config(dtype))`` is the same
model. A layer is quantised as it is read, one at a time: the model is never there as a whole in more bits.

What training changes cannot go into such weights without quantising them anew, which would change all of them. It
stands beside them: ``y = x W_0^T + x A^T B^T`` with W_0 as it was quantised (`QuantizedLayer.beside`).

bitsandbytes is imported where a layer is made (`quantized_layers.py`), not before.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hsplit_flwr.errors import ConfigError

PLAIN = "none"
INT8 = "int8"
FOUR_BIT = ("nf4", "fp4")
METHODS = (*FOUR_BIT, INT8)
QUANTIZATION_FILE = "quantization_config.json"
"""beside an adapter: what its base is quantised by, as transformers writes it"""
BLOCK = 64
"""weights that share a scale in 4 bits"""
SCALE_BYTES = 4
_BITSANDBYTES = ("bitsandbytes", "QuantizationMethod.BITS_AND_BYTES")
_STATISTICS = re.compile(r"(?P<layer>.+)\.(?:weight\.(?P<of_weight>.+)|(?P<of_layer>SCB|weight_format))")


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are quantised."""

    method: str
    """one of `METHODS`"""
    settings: tuple[tuple[str, Any], ...] = ()
    """of `BitsAndBytesConfig`, beyond those that follow from the method; sorted"""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"Expected quantization as one of {(PLAIN, *METHODS)}, found {self.method!r}.")

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> Self | None:
        """What a checkpoint's config.json says; None if that is nothing, or nothing of bitsandbytes.

        Raises:
            ConfigError: see `of_stated`.
        """
        found = getattr(config, "quantization_config", None)
        return cls.of_stated(found if found is None or isinstance(found, Mapping) else found.to_dict())

    @classmethod
    def of_folder(cls, folder: Path) -> Self | None:
        """What the base of the adapter in `folder` is quantised by; None: it is not.

        Raises:
            ConfigError: the file that says so is damaged; or see `of_stated`.
        """
        if not (path := folder / QUANTIZATION_FILE).is_file():
            return None
        try:
            found = cls.of_stated(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"Expected {path} to say how the base is quantised, found: {error}.") from error
        if found is None:
            raise ConfigError(f"Expected {path} to say how the base is quantised by bitsandbytes, found nothing of it.")
        return found

    @classmethod
    def of_stated(cls, stated: object) -> Self | None:
        """What a `BitsAndBytesConfig` as JSON says; None if `stated` is none.

        Raises:
            ConfigError: settings of bitsandbytes that nothing here knows.
        """
        if not isinstance(stated, Mapping) or str(stated.get("quant_method")) not in _BITSANDBYTES:
            return None
        try:
            known = BitsAndBytesConfig.from_dict(dict(stated))
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"Expected settings of bitsandbytes, found {stated!r:.200}: {error}.") from error
        method = INT8 if known.load_in_8bit else known.bnb_4bit_quant_type
        if known.llm_int8_has_fp16_weight or known.bnb_4bit_quant_storage != torch.uint8:
            raise ConfigError(
                "Expected a checkpoint of bitsandbytes with weights packed into uint8 or int8, found "
                f"llm_int8_has_fp16_weight={known.llm_int8_has_fp16_weight} and "
                f"bnb_4bit_quant_storage={known.bnb_4bit_quant_storage}. Quantise it with the defaults of these two."
            )
        kept = ("llm_int8_threshold" if method == INT8 else "bnb_4bit_use_double_quant", "llm_int8_skip_modules")
        stated_values = {key: getattr(known, key) for key in kept}
        return cls(method, tuple((key, value) for key, value in stated_values.items() if value is not None))

    @classmethod
    def chosen(cls, config: PretrainedConfig, method: str) -> Self | None:
        """How the base of `config` is held where users choose `method`; None for ``none``: as its files have it.

        Raises:
            ConfigError: no such method, or the checkpoint is quantised by another.
        """
        if method == PLAIN:
            return None
        quantization, stored = cls(method), cls.of_config(config)
        if stored and stored.method != method:
            raise ConfigError(
                f"Expected a checkpoint that is quantised by {stored.method} to stay so, found quantization = "
                f'{method!r}. Set quantization = "{stored.method}", or take the checkpoint that it was made from.'
            )
        return stored or quantization

    def transformers_config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """What to give to ``from_pretrained`` for the same base, computing in `dtype`."""
        if self.method == INT8:
            return BitsAndBytesConfig(load_in_8bit=True, **dict(self.settings))
        own = {"load_in_4bit": True, "bnb_4bit_quant_type": self.method, "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(**own, **dict(self.settings))

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what an adapter's base is quantised by beside that adapter, for `of_folder`."""
        self.transformers_config(dtype).to_json_file(folder / QUANTIZATION_FILE)

    def layer_names(self, skeleton: PreTrainedModel) -> list[str]:
        """The layers of a whole model that are quantised, in its order."""
        skipped = HfQuantizer.get_modules_to_not_convert(
            skeleton, dict(self.settings).get("llm_int8_skip_modules"), skeleton._keep_in_fp32_modules
        )
        return [
            name
            for name, module in skeleton.named_modules()
            if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, skipped)
        ]

    def place(self, skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
        """Put quantised layers without weights, computing in `dtype`, in place of the plain ones of a whole model.

        Raises:
            ConfigError: bitsandbytes is not installed.
        """
        for name in self.layer_names(skeleton):
            plain = skeleton.get_submodule(name)
            skeleton.set_submodule(name, _layers().empty(self, plain, dtype))
        mark(skeleton, self)

    def weight_bytes(self, d_out: int, d_in: int) -> int:
        """Bytes of one weight (d_out, d_in) and its scales. With nested scales it is less."""
        if self.method == INT8:
            return d_out * d_in + SCALE_BYTES * d_out
        return -(-d_out * d_in // 2) + SCALE_BYTES * -(-d_out * d_in // BLOCK)


class QuantizedLayer(nn.Linear):
    """A linear layer whose frozen weight is quantised, with what training changed beside it.

    Its classes (`quantized_layers.py`) are those of bitsandbytes at the same time, so PEFT puts its own quantised LoRA
    layers around them.
    """

    quantization: Quantization
    transposed: bool
    """whether the plain layer stored its weight as (d_in, d_out)"""
    beside: tuple[Tensor, ...] = ()
    """one matrix (d_out, d_in), or A (r, d_in) and B (d_out, r), float32, whose product is added; empty: nothing"""

    def load(self, weight: Tensor, statistics: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Take a weight: as the plain layer has it, which is quantised; or quantised, with its `statistics`.

        Raises:
            ConfigError: statistics that do not fit.
        """
        raise NotImplementedError

    def stored_weight(self) -> Tensor:
        """W_0 (d_out, d_in), float32: dequantised, in memory of its own."""
        raise NotImplementedError

    def stand(self, *beside: Tensor) -> None:
        """Let copies of these matrices be what stands beside the weight (see `beside`)."""
        self.beside = tuple(matrix.to(self.weight.device, copy=True) for matrix in beside)

    def with_beside(self, output: Tensor, inputs: Tensor) -> Tensor:
        """The layer's output, from that of the quantised weight."""
        if not self.beside:
            return output
        change = inputs
        for matrix in self.beside:
            change = F.linear(change.to(matrix.dtype), matrix)
        return output + change.to(output.dtype)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that a linear layer computes with, as its class stores it: of a quantised one (d_out, d_in), float32.

    What stands beside a quantised weight is in it. Not to be changed in place.
    """
    if isinstance(layer, QuantizedLayer):
        weight = layer.stored_weight()
        if len(layer.beside) == 1:
            return weight.add_(layer.beside[0])
        return weight.addmm_(layer.beside[1], layer.beside[0]) if layer.beside else weight
    plain = layer.weight
    assert isinstance(plain, Tensor)
    return plain


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config as if its checkpoint were not quantised."""
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    return plain


def statistics_of(stored: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of a quantised weight in a checkpoint -> what lies beside it there: key of its statistics -> stored name."""
    found: dict[str, dict[str, str]] = {}
    for name in stored:
        if match := _STATISTICS.fullmatch(name):
            key = match["of_weight"] or match["of_layer"]
            found.setdefault(f"{match['layer']}.weight", {})[key] = name
    return found


def share(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Put the quantised layers of `model` into a `skeleton` of the same config: the layers themselves."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            skeleton.set_submodule(name, module)
            mark(skeleton, module.quantization)


def mark(model: PreTrainedModel, quantization: Quantization) -> None:
    """What transformers notes on a quantised model, by which PEFT chooses its layers."""
    model.is_loaded_in_8bit = quantization.method == INT8
    model.is_loaded_in_4bit = quantization.method in FOUR_BIT


def _layers() -> Any:
    try:
        from hsplit_flwr.models import quantized_layers
    except ImportError as error:
        raise ConfigError(
            f"Expected the package bitsandbytes for a quantised base, found: {error}. "
            "Run: pip install 'hsplit_flwr[quantized]', or set quantization = \"none\"."
        ) from error
    return quantized_layers
