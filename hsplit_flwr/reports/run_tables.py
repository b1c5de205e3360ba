"""What a run shows: its records as plain-text or Markdown tables."""

from collections.abc import Iterable, Sequence

from hsplit_flwr.common.progress import format_duration
from hsplit_flwr.common.tables import (
    MISSING,
    client_order,
    format_bytes,
    format_number,
    format_seconds,
    format_table,
)
from hsplit_flwr.data.slots import SlotScore
from hsplit_flwr.reports.health.records import Finding
from hsplit_flwr.reports.records import CLIENT_PHASES, ROUND_PHASES, ClientRecord, RoundRecord, RunSummary


def round_table(records: Sequence[RoundRecord], *, markdown: bool = False) -> str:
    """A row per round: perplexities, training loss, tokens, incidents (failed or late clients), seconds by phase."""
    header = ["round", "ppl central", "ppl federated", "train loss", "tokens", "incidents"]
    rows = [
        [
            str(record.round),
            format_number(record.central_perplexity),
            format_number(record.federated_perplexity),
            format_number(record.train_loss),
            f"{record.tokens:,}",
            str(len(record.failures)),
            *(format_seconds(record.seconds.get(phase)) for phase in ROUND_PHASES),
        ]
        for record in records
    ]
    return format_table([*header, *(f"{phase} s" for phase in ROUND_PHASES)], rows, markdown)


def client_table(records: Sequence[RoundRecord], *, markdown: bool = False) -> str:
    """A row per client, summed over `records`: its cuts and ranks, tokens, bytes and seconds by phase.

    Cut and ranks list each value once, in the order of the rounds; the loss is that of its last round.
    """
    by_client: dict[str, list[ClientRecord]] = {}
    for record in records:
        for client in record.clients:
            by_client.setdefault(client.client_id, []).append(client)
    header = ["client", "cut", "rank", "rounds", "steps", "tokens", "loss", "up", "down"]
    rows = []
    for client_id in sorted(by_client, key=client_order):
        parts = by_client[client_id]
        losses = [part.loss for part in parts if part.loss is not None]
        seconds = [[p.seconds[phase] for p in parts if phase in p.seconds] for phase in CLIENT_PHASES]
        rows.append(
            [
                client_id,
                _each_once(str(part.cut) for part in parts),
                _each_once(part.ranks for part in parts),
                str(len(parts)),
                str(sum(part.steps for part in parts)),
                f"{sum(part.tokens for part in parts):,}",
                format_number(losses[-1] if losses else None),
                format_bytes(sum(part.bytes_up for part in parts)),
                format_bytes(sum(part.bytes_down for part in parts)),
                *(format_seconds(sum(values) if values else None) for values in seconds),
            ]
        )
    return format_table([*header, *(f"{phase} s" for phase in CLIENT_PHASES)], rows, markdown)


def summary_table(summary: RunSummary, *, markdown: bool = False) -> str:
    """What the run reached and cost, and what it takes to repeat it, as names and values."""
    clients = [client for record in summary.history for client in record.clients]
    initial, final = summary.initial_perplexity, summary.final_perplexity
    rows = [
        ["perplexity", f"{format_number(initial)} -> {format_number(final)}"],
        ["rounds", str(len(summary.history))],
        ["clients", str(len({client.client_id for client in clients}))],
        ["tokens trained", f"{sum(client.tokens for client in clients):,}"],
        ["bytes up", format_bytes(sum(client.bytes_up for client in clients))],
        ["bytes down", format_bytes(sum(client.bytes_down for client in clients))],
        ["incidents", str(sum(len(record.failures) for record in summary.history))],
        ["wall time", format_duration(summary.wall_seconds)],
    ]
    if best := summary.best:
        scored = f"{best.round} (perplexity {format_number(best.perplexity)} on {best.measured_on})"
        rows.append(["best round", f"{scored}, in {best.adapter}" if best.adapter else scored])
    if summary.slots:
        rows.append(["slots right", " -> ".join(_slots(score) for score in summary.slots.values())])
    if summary.adapter is not None:
        exactness = "exact" if summary.adapter["exact"] else "truncated"
        error = f"relative error {summary.adapter['relative_error']:.2g}"
        rows.append(["PEFT adapter", f"rank {summary.adapter['max_rank']}, {exactness} ({error})"])
        if (lost := summary.adapter.get("delta_error")) is not None:
            rows.append(["beside a quantised base", f"relative error {lost:.2g} of what was trained (delta-rank)"])
    rows += [
        ["seed", str(summary.seed)],
        ["commit", summary.commit or MISSING],
        ["versions", ", ".join(f"{name} {version or MISSING}" for name, version in summary.versions.items())],
    ]
    return format_table(["result", "value"], rows, markdown, left_aligned=2)


def run_report(summary: RunSummary, *, markdown: bool = False) -> str:
    """The three tables of a run under headings, its health, and one line for each client that failed.

    A run that is not completed, or was before its last round, says so first.
    """
    failures = [f"round {record.round}: {text}" for record in summary.history for text in record.failures]
    sections = {
        "Rounds": round_table(summary.history, markdown=markdown),
        "Clients": client_table(summary.history, markdown=markdown),
        "Result": summary_table(summary, markdown=markdown),
    }
    if summary.health:
        sections["Health"] = health_section(summary.health, markdown=markdown)
    if failures:
        sections["Failures"] = "\n".join(f"- {line}" if markdown else line for line in failures)
    heading = "### {}\n\n{}" if markdown else "{}\n{}"
    parts = [heading.format(title, body) for title, body in sections.items()]
    return "\n\n".join([*_status_lines(summary), *parts])


def _status_lines(summary: RunSummary) -> list[str]:
    rounds = f"after {len(summary.history)} round{'' if len(summary.history) == 1 else 's'}"
    if summary.status == "failed":
        return [f"THE RUN FAILED {rounds}: {summary.reason or 'no reason given'}"]
    if summary.status == "completed" and summary.reason:
        return [f"The run ended early, {rounds}: {summary.reason}."]
    return [f"The run is under way: these are its results {rounds}."] if summary.status == "running" else []


def _slots(score: SlotScore) -> str:
    return f"{score.right} of {score.total} ({100 * score.share:.0f} %)"


def health_section(findings: Sequence[Finding], *, markdown: bool = False) -> str:
    """A row per failure sign; below, cause and remedy of each warning."""
    rows = [[finding.sign, finding.status, finding.measured] for finding in findings]
    table = format_table(["sign", "status", "measured"], rows, markdown, left_aligned=3)
    warnings = [finding for finding in findings if finding.status == "warning"]
    lines = [line for f in warnings for line in (f"- {f.sign}: {f.cause}.", f"  Remedy: {f.remedy}.")]
    return "\n".join([table, "", *lines] if lines else [table])


def _each_once(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def plan_history(records: Sequence[RoundRecord], *, markdown: bool = False) -> str:
    """A row per round: whether it began to follow a new plan, how far importance had drifted, and why."""
    rows = [
        [
            str(record.round),
            "new" if record.plan_reasons else "kept",
            MISSING if record.drift is None else f"{record.drift:.3f}",
            "; ".join(record.plan_reasons) or MISSING,
        ]
        for record in records
    ]
    return format_table(["round", "plan", "drift", "why"], rows, markdown, left_aligned=4)
