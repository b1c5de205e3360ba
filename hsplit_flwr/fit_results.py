"""What clients send back at the end of a training round, checked against what they were asked for."""

from collections.abc import Mapping

import torch
from flwr.common import FitRes, parameters_to_ndarrays

from hsplit_flwr.aggregation import check_factors
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora import LoraFactors
from hsplit_flwr.plan import ClientPlan
from hsplit_flwr.results import CLIENT_PHASES, ClientRecord, describe_ranks
from hsplit_flwr.tail_service import Ticket


def read_adapters(
    res: FitRes, client: str, plan: ClientPlan, head_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, LoraFactors]:
    """The adapters of a client's head, by whole-model module name.

    Args:
        res: A and B of every adapted module, in the order of the model.
        client: who was asked.
        plan: what it was asked for.
        head_shapes: (d_out, d_in) of the linear layers of its head, in the order of the model.

    Raises:
        AggregationError: of another client, or not exactly the planned tensors, or not finite.
        ValueError: not NumPy arrays (pickled ones are not read).
    """
    if (named := res.metrics.get("client")) != client:
        raise AggregationError(f"Expected a result that names client {client!r}, found {named!r}.")
    names = plan.lora.targets(head_shapes)
    arrays = parameters_to_ndarrays(res.parameters)
    if len(arrays) != 2 * len(names):
        raise AggregationError(f"Expected {2 * len(names)} adapter tensors, found {len(arrays)}.")
    adapters = {}
    for name, A, B in zip(names, arrays[::2], arrays[1::2], strict=True):
        d_out, d_in = head_shapes[name]
        rank = plan.lora.rank(name)
        if A.shape != (rank, d_in) or B.shape != (d_out, rank) or {str(A.dtype), str(B.dtype)} != {"float32"}:
            raise AggregationError(
                f"Expected float32 A {(rank, d_in)} and B {(d_out, rank)} for {name}, "
                f"found {A.dtype} {A.shape} and {B.dtype} {B.shape}."
            )
        adapters[name] = LoraFactors(torch.from_numpy(A), torch.from_numpy(B), plan.lora.scaling(name))
        check_factors(adapters[name])
    return adapters


def client_record(ticket: Ticket, res: FitRes, adapters: Mapping[str, LoraFactors]) -> ClientRecord:
    """A client's round, as far as possible from what the tail itself counted; its seconds are its own word."""
    ranks = [factors.rank for factors in adapters.values()]
    return ClientRecord(
        client_id=ticket.client,
        cut=ticket.cut,
        ranks=describe_ranks(ranks),
        mean_rank=sum(ranks) / max(1, len(ranks)),
        tokens=ticket.tokens,
        steps=ticket.steps,
        loss=ticket.nll / ticket.tokens if ticket.tokens else None,
        bytes_up=ticket.bytes_up + sum(len(tensor) for tensor in res.parameters.tensors),
        bytes_down=ticket.bytes_down,
        seconds={phase: float(res.metrics.get(f"{phase}_s", 0.0)) for phase in CLIENT_PHASES},
    )
