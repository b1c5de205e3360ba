"""What leaves a federated run: the merged model, or one PEFT adapter that equals all its increments.

Both load with the stock readers: ``AutoModelForCausalLM.from_pretrained`` and ``PeftModel.from_pretrained``.
The adapter is exact where its rank may be as large as that of the cumulative delta, else it is the best
approximation of the rank asked for (Eckart and Young, 1936), and its relative error is returned.

The modules' ranks differ. Readers that take alpha over the rank of each tensor for its scaling, and know no patterns,
would misread that (logits 3.49 off where training had changed them by 2.67), so A and B are padded with zeros to one
rank, which equals alpha: everybody reads a scaling of 1. Where that would take more than `MAX_PADDING` times the
bytes, the ranks stay apart, PEFT's patterns say so, and a warning does.

Shapes: d_out and d_in of the linear layer (``nn.Linear`` orientation throughout), R rank of stacked factors.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from hsplit_flwr.errors import AggregationError, ConfigError
from hsplit_flwr.lora.factors import LoraFactors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXACT_TOLERANCE = 1e-6
"""Relative Frobenius error up to which an adapter counts as exact: what sums in float32 leave as noise."""
MAX_PADDING = 2.0
"""How many times larger an adapter may become by zeros that give all of its modules one rank."""

_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True)
class AdapterExport:
    """An adapter that was written: its ranks and how far it is from the delta it stands for.

    Errors are ``||delta - B A||_F / ||delta||_F``, before the factors are rounded to float32.
    """

    ranks: Mapping[str, int]
    """Rank by module name, without padding; modules that did not change are left out."""
    module_errors: Mapping[str, float]
    """Relative error by module name."""
    relative_error: float
    """Relative error over all modules together."""

    @property
    def exact(self) -> bool:
        """Whether nothing but float32 noise (`EXACT_TOLERANCE`) was cut off."""
        return self.relative_error <= EXACT_TOLERANCE

    @property
    def max_rank(self) -> int:
        """The largest rank of a module."""
        return max(self.ranks.values())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form for the run's summary."""
        return {
            "max_rank": self.max_rank,
            "relative_error": self.relative_error,
            "exact": self.exact,
            "ranks": dict(self.ranks),
            "module_errors": dict(self.module_errors),
        }


def save_merged(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: str | Path) -> None:
    """Write a whole model, whose increments are already merged, and its tokenizer to `folder`.

    The base's generation config (end tokens, penalties) and the tokenizer's chat template go with it.

    Raises:
        ConfigError: the model still holds adapters, so its weights are not the merged ones.
    """
    adapters = [name for name, _ in model.named_parameters() if ".lora_" in name or ".base_layer." in name]
    if adapters:
        raise ConfigError(
            f"Expected a merged model without adapters, found {len(adapters)} adapter or wrapped parameters "
            f"({adapters[0]}, ...). Merge the increments and unload the adapters before saving."
        )
    generation = model.generation_config
    model.generation_config = type(generation)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    # As the base came: transformers itself refuses to write what many published ones say (a temperature without
    # sampling), and a run must not fail at that after its last round.
    generation.to_json_file(Path(folder) / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_peft_adapter(
    deltas: Mapping[str, LoraFactors | Tensor],
    base_model_name: str,
    folder: str | Path,
    *,
    max_rank: int | None = None,
    fan_in_fan_out: bool = False,
) -> AdapterExport:
    """Write cumulative deltas as ``adapter_config.json`` and ``adapter_model.safetensors`` for PEFT.

    Args:
        deltas: By whole-model module name, the change of the weight since the base model: stacked factors
            A (R, d_in) and B (d_out, R) (at R = 160, d = 4096 0.3 s on two CPU cores), or dense (d_out, d_in)
            (there a minute). Read one at a time, so a mapping may form them on access.
        base_model_name: Hub name or folder of the base model, for ``base_model_name_or_path``.
        folder: Created where missing.
        max_rank: Largest rank of a module; None for as much as exactness takes.
        fan_in_fan_out: True where the base keeps its weights transposed (the ``Conv1D`` of GPT-2).

    Raises:
        ConfigError: `max_rank` is below 1.
        AggregationError: a delta has a wrong shape or is not finite, or no weight has changed.
    """
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"Expected max_rank >= 1 or None (exact), found {max_rank}.")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    for name, delta in deltas.items():
        best = _best_factors(name, delta, max_rank)
        if best is None:
            continue
        factors[name] = best.A.to("cpu", torch.float32), best.B.to("cpu", torch.float32)
        lost[name], total[name] = best.lost, best.total
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    if not ranks:
        raise AggregationError(
            f"Expected a delta that is not zero, found none in {len(deltas)} modules. "
            "There is nothing to export before the first merged round."
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    written = _padded(factors)
    _write_config(path, base_model_name, {name: A.shape[0] for name, (A, _) in written.items()}, fan_in_fan_out)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor.contiguous()
        for name, pair in written.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return AdapterExport(
        ranks=ranks,
        module_errors={name: (lost[name] / total[name]) ** 0.5 for name in ranks},
        relative_error=(sum(lost.values()) / sum(total.values())) ** 0.5,
    )


def _padded(factors: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, tuple[Tensor, Tensor]]:
    """A (r, d_in) and B (d_out, r) of one rank r for all modules, or as they are if that takes too many zeros."""
    rank = max(A.shape[0] for A, _ in factors.values())
    smallest = sum(A.numel() + B.numel() for A, B in factors.values())
    largest = sum(rank * (A.shape[1] + B.shape[0]) for A, B in factors.values())
    if largest > MAX_PADDING * smallest:
        _log.warning(
            "The adapter keeps ranks up to %d that differ by module, since one rank would make it %.1f times larger. "
            "PEFT reads it; a reader that knows no rank_pattern and alpha_pattern does not: check it there.",
            rank,
            largest / smallest,
        )
        return factors
    return {
        name: (F.pad(A, (0, 0, 0, rank - A.shape[0])), F.pad(B, (0, rank - B.shape[1])))
        for name, (A, B) in factors.items()
    }


def _write_config(folder: Path, base_model_name: str, ranks: Mapping[str, int], fan_in_fan_out: bool) -> None:
    """``lora_alpha`` equals the rank in every module, so the scaling is 1 and B A is the delta itself."""
    from peft import LoraConfig

    r = max(ranks.values())
    # The keys are regular expressions to PEFT. Readers that know r and lora_alpha alone scale by 1 too.
    pattern = {re.escape(name): rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        lora_dropout=0.0,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=fan_in_fan_out,
    )
    config.target_modules = sorted(ranks)  # as an argument it becomes a set, written in a random order
    config.save_pretrained(str(folder))


@dataclass(frozen=True)
class _BestFactors:
    A: Tensor
    """(r, d_in), float64"""
    B: Tensor
    """(d_out, r), float64"""
    lost: float
    """``||delta - B A||_F^2``"""
    total: float
    """``||delta||_F^2``"""


def _best_factors(name: str, delta: LoraFactors | Tensor, max_rank: int | None) -> _BestFactors | None:
    """The best factors of at most `max_rank`, or None where the delta is zero."""
    if isinstance(delta, Tensor):
        _check(name, delta.ndim == 2, f"a dense delta (d_out, d_in), found the shape {tuple(delta.shape)}")
        core = delta.double()
        left = right = None
    else:
        A, B = delta.A.double(), delta.B.double()
        fits = A.ndim == 2 and B.ndim == 2 and B.shape[1] == A.shape[0]
        _check(name, fits, f"A (R, d_in) and B (d_out, R), found A {tuple(A.shape)} and B {tuple(B.shape)}")
        left, left_core = torch.linalg.qr(B)
        right, right_core = torch.linalg.qr(A.T)
        core = delta.scaling * (left_core @ right_core.T)
    total = float(core.square().sum())
    _check(name, total < float("inf"), "finite values, found NaN or infinity")
    if total == 0:
        return None
    A, B, lost = _truncate(core, total, max_rank)
    return _BestFactors(
        A=A if right is None else A @ right.T, B=B if left is None else left @ B, lost=lost, total=total
    )


def _truncate(core: Tensor, total: float, max_rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Balanced A, B of the truncated SVD of `core` (float64, squared norm `total`) and the squared error.

    By the eigenvectors of the smaller Gram matrix: in float64 they resolve relative errors down to 1e-8, far
    below `EXACT_TOLERANCE`, in a third of the time of a float64 SVD.
    """
    tall = core.shape[0] >= core.shape[1]
    thin = core if tall else core.T
    energies, vectors = torch.linalg.eigh(thin.T @ thin)
    energies, vectors = energies.flip(0), vectors.flip(1)
    lost = (total - energies.cumsum(0)).clamp(min=0)  # after keeping 1, 2, ... directions
    rank = int((lost > EXACT_TOLERANCE**2 * total).sum()) + 1
    rank = min(rank, len(energies), max_rank or len(energies))
    V = vectors[:, :rank]
    US = thin @ V
    # Equal norms on both sides keep the factors in range where they are later stored in half precision.
    root = US.norm(dim=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    B, A = US / root, (V * root).T
    return (A, B, float(lost[rank - 1])) if tall else (B.T, A.T, float(lost[rank - 1]))


def _check(name: str, condition: bool, expected: str) -> None:
    if not condition:
        raise AggregationError(f"Delta of {name}: expected {expected}. Export what the aggregation returned.")
