"""A bar on the terminal that says how far a calibration is; nothing where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(wanted: bool, steps: int, what: str) -> Iterator[Callable[[str], None]]:
    """Gives a function that names the step which begins.

    Args:
        wanted: show the bar on stderr, if that is a terminal.
        steps: how many there will be.
        what: in front of the bar.
    """
    if not wanted or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task, begun = bar.add_task(what, total=steps), False

        def step(name: str) -> None:
            nonlocal begun
            bar.update(task, advance=int(begun), description=f"{what} {name}")
            begun = True

        yield step
