"""What clients send back at the end of a training round, checked against what they were asked for."""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.common import FitRes, parameters_to_ndarrays
from flwr.common.typing import NDArray

from hsplit_flwr.common.tables import describe_ranks
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.flower.messages import BUDGETS_KEY, REFUSED_KEY, budgets_from_json
from hsplit_flwr.lora.factors import LoraFactors, check_factors
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.reports.records import CLIENT_PHASES, ClientRecord
from hsplit_flwr.training.config import ClientPlan

Trained = tuple[dict[str, LoraFactors], dict[str, float]]
"""adapters and importance, both by whole-model module name"""


def read_trained(res: FitRes, client: str, plan: ClientPlan, head_shapes: Mapping[str, tuple[int, int]]) -> Trained:
    """The adapters of a client's head, and the importance of its linear layers ({} if it measured none).

    Args:
        res: A and B of every adapted module, in the order of the model, then one vector with the importance.
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
    if len(arrays) != 2 * len(names) + 1:
        raise AggregationError(
            f"Expected {2 * len(names)} adapter tensors and importance, found {len(arrays)} tensors."
        )
    *arrays, importance = arrays
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
    return adapters, _read_importance(importance, list(head_shapes))


def require_accepted(res: FitRes) -> None:
    """Raises `AggregationError` with the client's reason if it refused its task."""
    if (reason := res.metrics.get(REFUSED_KEY)) is not None:
        raise AggregationError(f"refused: {reason if isinstance(reason, str) else repr(reason)}")


def _read_importance(values: NDArray, names: list[str]) -> dict[str, float]:
    if values.size == 0:
        return {}
    if values.shape != (len(names),) or str(values.dtype) != "float32":
        raise AggregationError(
            f"Expected float32 importance of {len(names)} linear layers, found {values.dtype} {values.shape}."
        )
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise AggregationError("Expected finite importance >= 0, not all of it 0, found other values.")
    return dict(zip(names, values.tolist(), strict=True))


def read_budget(res: FitRes, client: str) -> Budget | None:
    """What `client` says it can afford from the next round on; None where it does not say.

    Raises:
        ConfigError: not a budget.
    """
    if BUDGETS_KEY not in res.metrics:
        return None
    return budgets_from_json(res.metrics[BUDGETS_KEY]).get(client)


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
