"""Plain-text tables: aligned columns for `print`, and the same lines as markup for `rich.print`."""

from collections.abc import Sequence


def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The header and the rows, each cell as wide as the widest of its column."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (columns, *rows)
    ]


def painted(line: str, colour: str | None) -> str:
    """A line as rich markup; a string of markup is a renderable, so no import of rich is needed."""
    escaped = line.replace("[", "\\[")
    return f"[{colour}]{escaped}[/]" if colour else escaped
