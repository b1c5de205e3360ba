"""What a round makes a device do, for the virtual clock: FLOPs of the cost model, bytes of the real batches.

The cost model is of batches at their full length; a round's FLOPs are scaled by the positions its batches really had,
padding included, for it is computed on. On the wire it is not, and there bytes are of the frames as they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.lora import factors as lora_factors
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.planning.clock import ClientWork
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.training.batch import Batch, part_rows
from hsplit_flwr.training.session import BatchPart, wants_gradient

Ranks = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """What a trainer did in a round."""

    work: tuple[ClientWork, ...]
    tokens: int
    """target tokens of all clients"""
    train_loss: float
    """mean over the clients, weighted by tokens, of their mean loss over the steps"""
    too_large: int
    """clients whose part needs more memory than their device has"""
    server_flops: float = 0.0
    """FLOPs of the server outside of the steps, or of all of its training if there are no clients"""


Forms = Sequence[Sequence[BatchForm]]
"""by batch, of the parts that it travels in"""


def recorded(batches: Iterable[Batch], forms: list[list[BatchForm]], parts: int = 1) -> Iterator[Batch]:
    """`batches`, with the forms of the parts of each noted in `forms`."""
    for batch in batches:
        mask, labels = batch["attention_mask"], batch["labels"]
        forms.append([BatchForm.of(mask[rows], labels[rows]) for rows in part_rows(len(labels), parts)])
        yield batch


def length_factor(costs: ModelCosts, forms: Forms) -> float:
    """Positions of a mean batch, padding included, over those that `costs` is for."""
    full = costs.workload.batch_size * costs.workload.sequence_length
    return fmean(sum(form.rows * form.width for form in parts) for parts in forms) / full


def split_work(
    client: str,
    costs: ModelCosts,
    cut: int,
    ranks: Ranks,
    tail_ranks: Ranks,
    forms: Forms,
    *,
    download_bytes: float,
    upload_bytes: float,
) -> ClientWork:
    """A head's round. Its forward pass without adapters counts as forward, all else as backward."""
    factor = length_factor(costs, forms)
    forward, load, H = costs.head_flops(cut, {}), costs.workload, costs.hidden_size
    trains = any(ranks.values())

    def bytes_down(part: BatchPart, form: BatchForm) -> int:
        wanted = wants_gradient(part, trains=trains, importance_steps=load.importance_steps)
        return frame_bytes.step_bytes_down(load, H, form, wants_gradient=wanted)

    return ClientWork(
        client=client,
        steps=len(forms),
        forward_flops=factor * forward,
        backward_flops=factor * (costs.head_flops(cut, ranks) - forward),
        step_bytes_up=fmean(sum(frame_bytes.step_bytes_up(load, H, form) for form in parts) for parts in forms),
        step_bytes_down=fmean(
            sum(bytes_down(BatchPart(step, number), form) for number, form in enumerate(parts))
            for step, parts in enumerate(forms)
        ),
        tail_flops=factor * costs.tail_flops(cut, tail_ranks),
        download_bytes=download_bytes,
        upload_bytes=upload_bytes,
    )


def weighed(work: ClientWork, round_weight: float) -> ClientWork:
    """The round for the clock, where what is exchanged once in it counts so many times (`settings.round_weight`)."""
    download, upload = round_weight * work.download_bytes, round_weight * work.upload_bytes
    return replace(work, download_bytes=download, upload_bytes=upload)


def whole_work(
    client: str,
    costs: ModelCosts,
    step_flops: float,
    forms: Forms,
    *,
    download_bytes: float,
    upload_bytes: float,
) -> ClientWork:
    """A round of a client that trains the whole model by itself; `step_flops` is of a full batch."""
    total = length_factor(costs, forms) * step_flops
    forward = min(total, length_factor(costs, forms) * whole_forward_flops(costs))
    return ClientWork(client, len(forms), forward, total - forward, 0, 0, 0, download_bytes, upload_bytes)


def whole_flops(costs: ModelCosts, ranks: Ranks) -> float:
    """A step of LoRA on the whole model."""
    last = costs.num_blocks - 1
    return costs.head_flops(last, ranks) + costs.tail_flops(last, ranks)


def whole_forward_flops(costs: ModelCosts) -> float:
    """A forward pass of the whole model; that of the last block and the LM head is half of forward and backward."""
    last = costs.num_blocks - 1
    return costs.head_flops(last, {}) + costs.tail_flops(last, {}) / 2


def full_flops(costs: ModelCosts) -> float:
    """A step that trains all weights: forward, as much for the inputs' gradients, as much for the weights'."""
    return 3 * whole_forward_flops(costs)


def factor_bytes(factors: Mapping[str, LoraFactors], *, frozen_A: bool = False) -> int:
    """Bytes of all A and B as float32; of B alone where everybody has A already."""
    if frozen_A:
        return sum(lora_factors.FLOAT32_BYTES * pair.B.numel() for pair in factors.values())
    return sum(map(lora_factors.factor_bytes, factors.values()))


def merge_flops(update: Mapping[str, LoraFactors]) -> float:
    """FLOPs of forming every matrix' dense update."""
    return sum(2.0 * pair.rank * pair.A.shape[1] * pair.B.shape[0] for pair in update.values())
