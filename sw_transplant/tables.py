"""Plain-text tables for reports; rich does the layout."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 160
"""Columns of a printed table: reports go to logs and files, so the terminal's own width is not asked."""


def render_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, without colours, its columns folded (never cut) to fit :data:`WIDTH` characters."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(
        file=io.StringIO(), width=WIDTH, no_color=True, highlight=False, markup=False, legacy_windows=False
    )
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
