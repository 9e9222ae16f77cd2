"""Sizes and tables are put into plain text here."""

from collections.abc import Sequence


def format_bytes(num_bytes: float) -> str:
    """Return a size in binary units with three decimals at most: ``1536`` is ``1.5 KiB``."""
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.0f} B"
    size, units = num_bytes / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3f}".rstrip("0").rstrip(".") + f" {units[0]}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table: first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)
