"""Plain-text and Markdown tables, and how figures are written in them."""

import re
from collections.abc import Iterable, Sequence

MISSING = "-"
Row = list[str]


def format_bytes(count: int) -> str:
    """Decimal units as for links: ``"999 B"``, ``"1.0 kB"``, ``"12.3 MB"``."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def format_number(value: float | None) -> str:
    """A perplexity or loss to about four digits; ``"-"`` where there is none."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"


def format_seconds(value: float | None) -> str:
    """Seconds to a tenth, to a thousandth below one; ``"-"`` where the phase was not timed."""
    if value is None:
        return MISSING
    return f"{value:.1f}" if value >= 0.9995 else f"{value:.3f}"


def format_table(header: Row, rows: Sequence[Row], markdown: bool, left_aligned: int = 0) -> str:
    """Padded columns, the first `left_aligned` aligned to the left, the others (numbers) to the right."""
    lines = [header, *rows]
    if markdown:
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    padded = [
        [
            cell.ljust(width) if column < left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    if markdown:
        rule = ["-" * w if c < left_aligned else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
        return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in [padded[0], rule, *padded[1:]])


def client_order(client_id: str) -> list[int | str]:
    """A sort key that puts client 2 before client 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", client_id)]


def describe_ranks(ranks: Iterable[int]) -> str:
    """``"8"`` where all modules have one rank, ``"2-16"`` where they differ, ``"0"`` without any adapter."""
    found = list(ranks)
    if not found:
        return "0"
    return str(min(found)) if min(found) == max(found) else f"{min(found)}-{max(found)}"
