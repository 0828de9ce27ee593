"""Tables for people, laid out by rich: columns side by side, lines whole."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

_WIDEST = 100_000
"""Columns that no line reaches: a terminal breaks longer lines, and a file or pipe keeps them whole."""


def text_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), rule_after: int = 0) -> str:
    """Rows as lines, two spaces between their columns, wide characters counted as two. right: columns whose cells end
    under each other. rule_after: a line is drawn after so many rows, 0 for none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        table.add_column(justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = io.StringIO()
    Console(file=out, width=_WIDEST, no_color=True, force_terminal=False, legacy_windows=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    if rule_after:
        lines.insert(rule_after, "-" * max(map(len, lines)))
    return "\n".join(lines)
