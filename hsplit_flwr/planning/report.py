"""A plan as plain-text or Markdown tables: who gets what, what it costs, what limits it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from hsplit_flwr.common.tables import client_order, describe_ranks, format_bytes, format_seconds, format_table
from hsplit_flwr.planning.costs.delta_costs import DiskEstimate, update_ranks
from hsplit_flwr.planning.exchange_choice import describe, describe_update
from hsplit_flwr.planning.round_plan import PlannedClient, PlannedTail, RoundPlan

if TYPE_CHECKING:
    from hsplit_flwr.planning.costs.model_costs import ModelCosts

TAIL = "tail"
DELTA_HEADER = ["client", "delta", "moment", "checkpoints", "disk", "memory"]
HEADER = ["client", "cut", "ranks", "adapted", "memory", "budget", "use %", "step s", "round s", "limited by"]


class DeltaEstimate(NamedTuple):
    """What the weight delta takes of one side."""

    disk: DiskEstimate
    memory_bytes: int
    """beside the weights, while a round's update goes in"""


def plan_table(plan: RoundPlan, *, markdown: bool = False) -> str:
    """A row per client and one for the tail, then the totals, then every client that is left out and why.

    *ranks*: lowest to highest rank in the head (0: some matrices without an adapter); *adapted*: matrices with an
    adapter, of those in the head; *memory*: predicted, against the *budget*; *step s*: one step if nothing went on at a
    time, with the tail's time for all clients; *round s*: until its adapters are sent, by the virtual clock;
    *limited by*: what keeps the client from more.
    """
    clients = [plan.clients[client] for client in sorted(plan.clients, key=client_order)]
    rows = [_client_row(client) for client in clients] + [_tail_row(plan.tail)]
    parts = [format_table(HEADER, rows, markdown), _totals(plan)]
    if plan.left_out:
        bullet = "- " if markdown else "  "
        lines = [f"{bullet}client {c}: {plan.left_out[c]}" for c in sorted(plan.left_out, key=client_order)]
        gap = "\n\n" if markdown else "\n"
        parts.append(f"Left out:{gap}" + "\n".join(lines))
    return "\n\n".join(parts)


def deltas_of(plan: RoundPlan, costs: "ModelCosts", rounds: int, keep_checkpoints: int) -> dict[str, DeltaEstimate]:
    """What the weight delta takes of each client and of the server (`TAIL`) after `rounds` rounds of `plan`.

    Args:
        plan: followed in all of them.
        costs: of its model.
        rounds: updates in the delta.
        keep_checkpoints: that the server keeps.
    """
    deltas, tail, change = costs.deltas, plan.tail.ranks, costs.workload.change_rank
    own = {name: _times(client.ranks, change) for name, client in plan.clients.items()}
    heads = [(client.cut, own[name]) for name, client in plan.clients.items()]
    ranks = update_ranks(heads, _times(tail, change), costs.matrices)
    if most := plan.update.rank:
        ranks = {name: min(rank, most) for name, rank in ranks.items()}
    found = {
        name: DeltaEstimate(
            deltas.client_disk(client.cut, ranks, own[name], rounds), deltas.client_loading(client.cut, ranks)
        )
        for name, client in plan.clients.items()
    }
    small = not plan.update.exact
    server = deltas.server_disk(ranks, tail, rounds, keep_checkpoints=keep_checkpoints, carries_rest=small)
    return found | {TAIL: DeltaEstimate(server, deltas.server_merging(ranks))}


def _times(ranks: Mapping[str, int], factor: int) -> dict[str, int]:
    return {name: factor * rank for name, rank in ranks.items()}


def delta_table(deltas: Mapping[str, DeltaEstimate], *, markdown: bool = False) -> str:
    """A row per client and one for the server.

    *delta*: its files after a round; *moment*: more while the next update goes in; *checkpoints*: of the server, the
    one being written included; *disk*: all of that, the room that is needed; *memory*: beside the weights while an
    update goes in, before training begins.
    """
    rows = [
        [name, *map(format_bytes, (d.delta, d.moment, d.checkpoints, d.total_bytes, deltas[name].memory_bytes))]
        for name in [*sorted(deltas.keys() - {TAIL}, key=client_order), TAIL]
        for d in [deltas[name].disk]
    ]
    return format_table(DELTA_HEADER, rows, markdown)


def _client_row(client: PlannedClient) -> list[str]:
    return [
        client.client,
        str(client.cut),
        *_ranks(client),
        *_memory(client),
        format_seconds(client.step_s),
        format_seconds(client.round_s),
        client.limited_by,
    ]


def _tail_row(tail: PlannedTail) -> list[str]:
    return [TAIL, "-", *_ranks(tail), *_memory(tail), format_seconds(tail.step_s), "-", "-"]


def _ranks(part: PlannedClient | PlannedTail) -> list[str]:
    ranks = part.ranks.values()
    return [describe_ranks(ranks), f"{sum(rank > 0 for rank in ranks)}/{len(ranks)}"]


def _memory(part: PlannedClient | PlannedTail) -> list[str]:
    use = part.memory_bytes / part.memory_budget_bytes
    return [format_bytes(part.memory_bytes), format_bytes(part.memory_budget_bytes), f"{100 * use:.1f}"]


def _totals(plan: RoundPlan) -> str:
    everyone = len(plan.clients) + len(plan.left_out)
    taking_part = f"{len(plan.clients):,} of {everyone:,} clients take part"
    time = f"a round takes {format_seconds(plan.round_s)} s, a step {format_seconds(plan.step_s)} s"
    untrained = not any(any(client.ranks.values()) for client in plan.clients.values())
    progress = f"{plan.pace:.3g} steps' worth of progress a step"
    frozen = "; heads train nothing" if plan.clients and untrained else ""
    travels = [describe(plan.exchange), *filter(None, [describe_update(plan.update)])]
    return f"{taking_part}; {time}; {', '.join(travels)}; {progress}{frozen}"
