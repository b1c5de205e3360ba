"""One row of models.py: an architecture, tried from cut to export on a tiny model with random weights.

The reference is always transformers' own model, in one piece, and PEFT's own adapters on it.
"""

import copy
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from _tiny_configs import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hsplit_flwr.errors import HSplitError
from hsplit_flwr.lora.export import save_merged, save_peft_adapter
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.merge import merge_into
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.equality import require_cuttable
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, linear_shapes, load_segment, segment_from_model
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.importance import ImportanceProbe, sample_rows
from hsplit_flwr.training.loss import token_losses
from hsplit_flwr.training.workload import Workload

COLUMNS = ("cut", "gradients", "folder", "plan", "export")
WORKS, REFUSED, DIFFERS, FAILED = "works", "refused", "differs", "raw error"
TOLERANCE = 1e-5
"""largest difference, in units of the largest entry: logits, losses"""
TRAINED_TOLERANCE = 1e-4
"""of gradients, of logits of merged weights"""
ROWS, TOKENS, RANK = 3, 9, 2
_QUOTED_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception)\b")
Cell = dict[str, Any]


class Different(Exception):  # noqa: N818  (a finding)
    """What was found differs from the reference."""


def model_row(model_type: str) -> dict[str, Any]:
    """The cells of one architecture: ``status``, ``detail`` and where it works the largest ``difference``."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"model_type": model_type, "not_run": None}
    try:
        config = tiny_config(model_type)
    except Exception as error:  # transformers' own code, on settings of ours
        return {**row, "not_run": _said(error), "cells": {}}
    gate = cell(lambda: gate_difference(config))
    try:
        whole = random_whole(config)
        logits_of(whole, "none")
    except Exception as error:  # what does not run on tokens alone has to be refused
        cells = {} if gate["status"] == WORKS else dict.fromkeys(COLUMNS, gate)
        return {**row, "not_run": _said(error), "cells": cells}
    row["class"] = type(whole).__name__
    if gate["status"] != WORKS:
        return {**row, "cells": dict.fromkeys(COLUMNS, gate)}
    pieces = list(halves(whole))
    checks: dict[str, Callable[[], float]] = {
        "cut": lambda: cut_difference(whole, pieces),
        "gradients": lambda: gradient_difference(whole, pieces),
        "folder": lambda: folder_difference(whole),
        "plan": lambda: plan_difference(whole),
        "export": lambda: export_difference(whole),
    }
    return {**row, "cells": {name: cell(check) for name, check in checks.items()}}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def gate_difference(config: PretrainedConfig) -> float:
    """What a run asks first of all: it refuses, or nothing."""
    require_cuttable(config)
    return 0.0


def cell(check: Callable[[], float]) -> Cell:
    """What comes of one check. A refusal that quotes a Python error is a raw error, too."""
    try:
        return {"status": WORKS, "difference": check()}
    except Different as found:
        return {"status": DIFFERS, "detail": str(found)}
    except HSplitError as refusal:
        return {"status": FAILED if _QUOTED_ERROR.search(str(refusal)) else REFUSED, "detail": str(refusal)}
    except Exception as error:
        return {"status": FAILED, "detail": f"{type(error).__name__}: {error!s:.300}"}


def random_whole(config: PretrainedConfig) -> PreTrainedModel:
    """The whole model in eval mode; every parameter is random, so that each one matters."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def batch(padding: str) -> dict[str, Tensor]:
    """Token ids, mask and labels (B, T): full rows, or one padded on that side; no padding predicts a target."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 100, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 6:] = 0
    elif padding == "left":
        mask[1, :3] = 0
    predicted = mask.bool()
    predicted[:, 1:] &= predicted[:, :-1].clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(predicted, -100)}


def logits_of(model: Any, padding: str) -> Tensor:
    """Logits (B, T, V) of a model in one piece."""
    inputs = {name: tensor for name, tensor in batch(padding).items() if name != "labels"}
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def require_equal(what: str, expected: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest difference in units of the largest expected entry. Raises `Different` beyond `tolerance`."""
    far = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12))
    if not far <= tolerance:
        raise Different(f"{what}: {far:.2g} off, of the largest entry")
    return far


def require_equal_logits(what: str, padding: str, expected: Tensor, found: Tensor, tolerance: float) -> float:
    """As `require_equal`, at the positions of tokens: nobody reads those of padding."""
    seen = batch(padding)["attention_mask"].bool()
    return require_equal(f"{what}, padding {padding}", expected[seen], found[seen], tolerance)


def sent(activations: Tensor, mask: Tensor) -> Tensor:
    """What the tail sees of a head's activations: no padding travels, zeros are put in its place."""
    return activations.where(mask.bool()[..., None], 0)


Piece = tuple[int, Segment, Segment]


def halves(whole: PreTrainedModel) -> Iterator[Piece]:
    """Every cut with its head and its tail."""
    num_blocks = segment_from_model(whole).num_blocks
    for cut in range(1, num_blocks):
        yield cut, segment_from_model(whole, 0, cut), segment_from_model(whole, cut)


def cut_difference(whole: PreTrainedModel, pieces: Sequence[Piece]) -> float:
    """Logits and losses of head and tail at every cut, padded and not, against the whole model."""
    far = [0.0]
    for padding in ("none", "right", "left"):
        inputs, expected = batch(padding), logits_of(whole, padding)
        mask, labels = inputs["attention_mask"], inputs["labels"]
        expected_loss = ForCausalLMLoss(expected, labels, expected.shape[-1])
        for cut, head, tail in pieces:
            with torch.no_grad():
                found = tail(sent(head(inputs["input_ids"], mask), mask), mask)
                loss = token_losses(found, labels).sum() / (labels[:, 1:] != -100).sum()
            far.append(require_equal_logits(f"cut {cut}", padding, expected, found, TOLERANCE))
            far.append(require_equal(f"loss at cut {cut}, padding {padding}", expected_loss, loss))
    return max(far)


def random_factors(segment: Segment) -> dict[str, LoraFactors]:
    """Trained adapters for every layer that takes one."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: LoraFactors(
            torch.randn(RANK, d_in, generator=generator) / d_in**0.5,
            torch.randn(d_out, RANK, generator=generator) * 0.1,
            2.0,
        )
        for name, (d_out, d_in) in linear_shapes(segment).items()
    }


def monolithic(whole: PreTrainedModel, factors: dict[str, LoraFactors], fan_in_fan_out: bool) -> Any:
    """PEFT's own model with these adapters on the whole model."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2.0 * RANK, target_modules=list(factors), fan_in_fan_out=fan_in_fan_out)
    model = peft.get_peft_model(copy.deepcopy(whole), config)
    for name, pair in factors.items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(pair.A)
        layer.lora_B["default"].weight.data.copy_(pair.B)
    return model.eval()


def is_transposed(segment: Segment) -> bool:
    """Whether the layers are transformers' ``Conv1D``."""
    return not all(isinstance(layer, torch.nn.Linear) for layer in segment.linear_modules().values())


def gradient_difference(whole: PreTrainedModel, pieces: Sequence[Piece]) -> float:
    """Gradients of all adapters in head and tail at every cut, importance measured, against PEFT in one piece."""
    segment = segment_from_model(whole)
    factors = random_factors(segment)
    reference = monolithic(whole, factors, is_transposed(segment))
    inputs = batch("right")
    mask, labels = inputs["attention_mask"], inputs["labels"]
    logits = reference(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).logits
    ForCausalLMLoss(logits, labels, logits.shape[-1]).backward()
    largest = max(float(p.grad.abs().max()) for p in reference.parameters() if p.grad is not None)
    far = [0.0]
    for cut, head, tail in pieces:
        sides = [SegmentAdapters(side, LoraSpec(RANK, 2.0 * RANK)) for side in (head, tail)]
        for side in sides:
            side.set({name: factors[name] for name in side.module_names})
        rows = [sample for sample in [sample_rows(labels, 2)] if sample]
        probes = [ImportanceProbe(side, rows, labels.shape, side.start) for side in (head, tail)]
        with probes[0], probes[1]:
            left = sent(head(inputs["input_ids"], mask), mask)
            entering = left.detach().requires_grad_()
            losses = token_losses(tail(entering, mask), labels)
            (losses.sum() / (labels[:, 1:] != -100).sum()).backward()  # type: ignore[no-untyped-call]
            left.backward(entering.grad)  # type: ignore[no-untyped-call]
        for probe in probes:
            probe.values()
        for side in sides:
            for name in side.module_names:
                layer: Any = reference.get_submodule(f"base_model.model.{name}")
                pair = (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad)
                for letter, expected, parameter in zip("AB", pair, side.parameters([name]), strict=True):
                    what = f"gradient of {name}.{letter} at cut {cut}"
                    far.append(_gradient_far(what, expected, parameter.grad, largest))
    return max(far)


def _gradient_far(what: str, expected: Tensor | None, found: Tensor | None, largest: float) -> float:
    if expected is None or found is None:
        if expected is not found:
            raise Different(f"{what}: {'none' if found is None else 'one'} where PEFT has another")
        return 0.0
    far = float((found - expected).abs().max()) / (float(expected.abs().max()) + 1e-4 * largest)
    if not far <= TRAINED_TOLERANCE:
        raise Different(f"{what}: {far:.2g} off, of its largest entry")
    return far


def folder_difference(whole: PreTrainedModel) -> float:
    """Head and tail, each read from a folder, against transformers' own loading of it."""
    with tempfile.TemporaryDirectory() as name:
        whole.save_pretrained(name)
        files = ModelFiles.resolve(name)
        require_cuttable(files.config)
        cut = max(1, segment_from_model(whole).num_blocks // 2)
        head, tail = load_segment(files, 0, cut), load_segment(files, cut)
        expected = logits_of(AutoModelForCausalLM.from_pretrained(name), "left")
        inputs = batch("left")
        with torch.no_grad():
            mask = inputs["attention_mask"]
            found = tail(sent(head(inputs["input_ids"], mask), mask), mask)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (head, tail, whole)]
        if not sizes[0] < sizes[2]:
            raise Different(f"the head holds {sizes[0]} parameters of {sizes[2]}")
        return require_equal_logits("read from a folder", "left", expected, found, TOLERANCE)


def plan_difference(whole: PreTrainedModel) -> float:
    """Costs of head and tail; their matrices are those that a run adapts."""
    costs = ModelCosts(whole.config, Workload(batch_size=2, sequence_length=8))
    planned = {matrix.name: (matrix.d_out, matrix.d_in) for matrix in costs.matrices}
    if planned != (held := linear_shapes(segment_from_model(whole))):
        raise Different(f"the plan's matrices: {sorted(planned.items() ^ held.items())[:2]}")
    ranks = {matrix.name: RANK for matrix in costs.matrices if matrix.block < 1}
    positive = (
        costs.head_memory(1, ranks).total_bytes,
        costs.tail_memory([1], {}).total_bytes,
        costs.tail_flops(1, {}),
        costs.head_flops(1, ranks),
    )
    if not all(value > 0 for value in positive):
        raise Different(f"costs of nothing: {positive}")
    return 0.0


def export_difference(whole: PreTrainedModel) -> float:
    """The merged model and the adapter, read by transformers and PEFT, against PEFT in one piece."""
    with tempfile.TemporaryDirectory() as name:
        base, merged, adapter = (Path(name) / part for part in ("base", "merged", "adapter"))
        whole.save_pretrained(base)
        segment = load_segment(ModelFiles.resolve(str(base)))
        factors = random_factors(segment)
        expected = logits_of(monolithic(whole, factors, is_transposed(segment)), "right")
        for layer_name, layer in segment.linear_modules().items():
            transposed, weight = not isinstance(layer, torch.nn.Linear), layer.weight
            assert isinstance(weight, Tensor)
            new = merge_into(weight, factors[layer_name], transposed=transposed, dtype=weight.dtype)
            weight.data = new
        save_merged(segment.model, None, merged)
        save_peft_adapter(factors, str(base), adapter, fan_in_fan_out=is_transposed(segment))
        read_merged = AutoModelForCausalLM.from_pretrained(merged)
        read_adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        return max(
            require_equal_logits("merged model", "right", expected, logits_of(read_merged, "right"), TRAINED_TOLERANCE),
            require_equal_logits("adapter", "right", expected, logits_of(read_adapter, "right"), TRAINED_TOLERANCE),
        )
