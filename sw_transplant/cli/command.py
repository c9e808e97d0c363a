"""What every command of sw-transplant has, whatever it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sw_transplant.cli.results import Result


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], Result],
    what: str,
    description: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Adds a command, with the options that all have.

    Args:
        commands: the parser's subcommands.
        name: of the command.
        run: what carries it out.
        what: a line for the list of commands.
        description, epilog: above and below its options, printed as they are.

    Returns:
        Its parser, for further options.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, all else on stderr")
    parser.add_argument("--traceback", action="store_true", help="show where bad input was noticed, too")
    return parser
