"""What a batch and its gradient are in a frame: what is put there, and what is checked before a model sees it.

Only what counts travels (`positions.py`): activations and gradients of the N positions before a target, the mask as
spans or bits, and the M labels that are targets.

    activations     (N, H) by the codec: of one part or more; without the rows that are referred to
    kept.rows       (K,) int32: rows whose activations the tail has (`row_references.py`); absent where there are none
    kept.digests    (K, 16) uint8: which those are
    size            (2,) int32: B and T
    mask.spans      (B, 2) int32: first token and number of tokens of every row; or mask.bits (B, T/8) uint8
    labels          (M,) int32
    labels.spans    (B, 2) int32: where they stand; or labels.bits (B, T/8) uint8
    gradient        (N, H) by the codec, as activations; absent if the head has no use for it

Shapes: B rows, T width, N positions that travel, M targets, K rows that are referred to, H hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.codecs import Codec, Layout, Part, Shape
from hsplit_flwr.exchange.frames import short
from hsplit_flwr.exchange.kept_rows import KeptRows
from hsplit_flwr.exchange.positions import (
    IGNORED,
    BatchForm,
    decode_marks,
    encode_marks,
    gathered,
    marks_layout,
    scattered,
    traveling,
    traveling_of,
)
from hsplit_flwr.exchange.row_references import refer, reference_layout, references_in, referred, restored
from hsplit_flwr.training.workload import Workload


def batch_layout(codec: Codec, form: BatchForm, hidden_size: int) -> Layout:
    """The tensors of a ``train`` or ``evaluate`` frame of a batch of `form`."""
    return {
        **codec.layout("activations", (form.positions - form.kept_positions, hidden_size)),
        **reference_layout(form.kept_rows),
        "size": Part((2,), torch.int32),
        **marks_layout("mask", form.rows, form.width, form.mask_in_spans),
        "labels": Part((form.targets,), torch.int32),
        **marks_layout("labels", form.rows, form.width, form.labels_in_spans),
    }


def batch_tensors(
    activations: Tensor, attention_mask: Tensor, labels: Tensor, codec: Codec, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a ``train`` or ``evaluate`` frame: (B, T, H) activations, (B, T) mask and labels.

    `seed` is for what the codec rounds by chance.
    """
    targets = labels != IGNORED
    real = gathered(activations.detach(), traveling(attention_mask, labels))
    return {
        **codec.encode("activations", real, seed),
        "size": torch.tensor(labels.shape, dtype=torch.int32),
        **encode_marks("mask", attention_mask != 0),
        "labels": labels[targets].to(torch.int32),
        **encode_marks("labels", targets),
    }


def without_kept(
    tensors: Mapping[str, Tensor], attention_mask: Tensor, labels: Tensor, codec: Codec, kept: KeptRows
) -> dict[str, Tensor]:
    """`batch_tensors` without the rows that the tail has, by the head's table, where they are noted."""
    packed = {name: tensors[name] for name in codec.layout("activations", (1, 1))}
    counts = traveling(attention_mask, labels).sum(1).tolist()
    return {**{name: part for name, part in tensors.items() if name not in packed}, **refer(packed, counts, kept)}


def check_batch(
    tensors: Mapping[str, Tensor],
    *,
    codec: Codec,
    hidden_size: int,
    vocab_size: int,
    workload: Workload | None = None,
    max_bytes: int | None = None,
    kept: KeptRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The activations, mask and labels in a ``train`` or ``evaluate`` frame, checked before anything is computed.

    Args:
        tensors: of the frame.
        codec: the run's.
        hidden_size: H.
        vocab_size: labels are below it.
        workload: the largest batch that was planned; None: any size.
        max_bytes: that a batch of this size may have without padding, as little of it as there be; None: any number.
        kept: the rows that the tail has of this client, to which those of the batch are added; None: it keeps none.

    Returns:
        Activations (B, T, H) with zeros where nothing travels, mask (B, T) uint8, labels (B, T) int32.

    Raises:
        ExchangeError: ``wrong_tensors``, ``wrong_dtype``, ``wrong_shape``, ``batch_too_large``, ``non_finite``,
            ``wrong_scale``, ``wrong_mask``, ``wrong_labels``, ``wrong_rows`` or ``unknown_rows``.
    """
    in_spans = ("mask.bits" not in tensors, "labels.bits" not in tensors)
    references = 0 if kept is None else references_in(tensors)
    _check_names(tensors, batch_layout(codec, BatchForm(1, 1, 1, 1, *in_spans, references), hidden_size))
    rows, width = _size(tensors["size"])
    _check_size(rows, width, workload, max_bytes, codec.layout("activations", (rows * width, hidden_size)))
    marks = {
        **marks_layout("mask", rows, width, in_spans[0]),
        **marks_layout("labels", rows, width, in_spans[1]),
    }
    _check_parts(tensors, {**marks, **reference_layout(references)})
    mask, targets = (decode_marks(name, tensors, width) for name in ("mask", "labels"))
    positions = traveling_of(mask, targets)
    counts: list[int] = positions.sum(1).tolist()
    without = sum(counts[number] for number in referred(tensors, rows))
    form = BatchForm(rows, width, sum(counts), int(targets.sum()), *in_spans, references, without)
    _check_parts(tensors, batch_layout(codec, form, hidden_size))
    if ((tensors["labels"] < 0) | (tensors["labels"] >= vocab_size)).any():
        raise ExchangeError("wrong_labels", f"Expected target labels in 0..{vocab_size - 1}, found others.")
    labels = torch.full((rows, width), IGNORED, dtype=torch.int32)
    labels[targets] = tensors["labels"]
    shape = (form.positions, hidden_size)
    if kept is None:
        activations = _decoded(codec, "activations", tensors, shape)
    else:
        packed, packed_rows = restored(tensors, codec.layout("activations", shape), counts, kept)
        activations = _decoded(codec, "activations", packed, shape)
        kept.note(packed_rows)
    return scattered(activations, positions), mask.to(torch.uint8), labels


def gradient_tensors(gradient: Tensor, positions: Tensor, codec: Codec, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a ``gradient`` frame: of a (B, T, H) gradient what travels, at `positions` (B, T)."""
    return codec.encode("gradient", gathered(gradient.detach(), positions), seed)


def check_gradient(tensors: Mapping[str, Tensor], positions: Tensor, hidden_size: int, codec: Codec) -> Tensor:
    """The gradient (B, T, H) in a ``gradient`` frame, zero but at the `positions` (B, T) that travel.

    Raises:
        ExchangeError: ``wrong_tensors``, ``wrong_dtype``, ``wrong_shape``, ``wrong_scale`` or ``non_finite``.
    """
    shape = (int(positions.sum()), hidden_size)
    layout = codec.layout("gradient", shape)
    _check_names(tensors, layout)
    _check_parts(tensors, layout)
    return scattered(_decoded(codec, "gradient", tensors, shape), positions.cpu())


def _size(size: Tensor) -> tuple[int, int]:
    _check_parts({"size": size}, {"size": Part((2,), torch.int32)})
    rows, width = size.tolist()
    if rows < 1 or width < 1:
        raise ExchangeError("wrong_shape", f"Expected a batch of at least 1 x 1 tokens, found {rows} x {width}.")
    return rows, width


def _check_size(rows: int, width: int, workload: Workload | None, max_bytes: int | None, full: Layout) -> None:
    """Padding costs a frame nothing, but those who compute on it: what counts is the batch's size with it."""
    if workload and (rows > workload.batch_size or width > workload.sequence_length):
        raise ExchangeError(
            "batch_too_large",
            f"Expected batches of at most {workload.batch_size} x {workload.sequence_length} tokens, as this round was "
            f"planned for, found {rows} x {width}. Raise the strategy's workload (batch-size, max-length), or use "
            "smaller batches.",
        )
    nbytes = sum(part.nbytes for part in full.values())
    if max_bytes is not None and nbytes > max_bytes:
        raise ExchangeError(
            "batch_too_large",
            f"Expected a batch that takes at most {max_bytes} bytes without padding, found {rows} x {width} tokens, "
            f"which take {nbytes}. Use smaller batches, or raise max-frame-mib on the server.",
        )


def _decoded(codec: Codec, name: str, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
    values = codec.decode(name, tensors, shape)
    if not all_finite(values):
        raise ExchangeError(
            "non_finite",
            f"Expected finite {name}, found NaN or Inf. Lower the learning rate, or use bf16 instead of fp16.",
        )
    return values


def _check_names(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    if tensors.keys() != layout.keys():
        raise ExchangeError("wrong_tensors", f"Expected the tensors {sorted(layout)}, found {short(sorted(tensors))}.")


def _check_parts(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    for name, part in layout.items():
        if tensors[name].dtype != part.dtype:
            raise ExchangeError("wrong_dtype", f"Expected {name} as {part.dtype}, found {tensors[name].dtype}.")
    for name, part in layout.items():
        if tensors[name].shape != part.shape:
            found = tuple(tensors[name].shape)
            raise ExchangeError("wrong_shape", f"Expected {name} of shape {part.shape}, found {found}.")
