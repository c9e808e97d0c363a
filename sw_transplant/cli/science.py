"""The commands about the papers: sw-transplant ladder | ..., their options and what they do."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from sw_transplant.cli import cost, erf, recipe
from sw_transplant.cli.command import add_command
from sw_transplant.cli.results import Result
from sw_transplant.science.cost import count_cost
from sw_transplant.science.ladder import LADDER, Step
from sw_transplant.tables import render_table


def add_science_commands(commands: Any, model_help: str) -> None:
    """Adds the commands about the papers to the parser's subcommands; ``model_help`` says what MODEL can be."""
    _add_ladder_options(
        add_command(
            commands,
            "ladder",
            run_ladder,
            "the steps from SLaK to SW, what each changes and costs",
            "Lists the steps of the ShiftwiseConv paper from SLaK to SW; each network is built and counted.",
        )
    )
    erf.add_options(
        add_command(
            commands,
            "erf",
            erf.run_erf,
            "effective receptive fields, as the papers' table and picture",
            f"Measures which pixels contribute to the centre of the last map.\n\n{model_help}",
        )
    )
    cost.add_options(
        add_command(
            commands,
            "cost",
            cost.run_cost,
            "parameters, multiplications and training memory, also without what is out of use",
            f"Counts parameters and multiplications as the papers do.\n\n{model_help}",
        )
    )
    recipe.add_options(
        add_command(
            commands,
            "recipe",
            recipe.run_recipe,
            "how a published network was trained, as settings of timm",
            "Prints a published training as YAML for timm's train.py, with the commands that run it.",
        )
    )


def _add_ladder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-cost", action="store_true", help="do not count, which takes half a minute")


def run_ladder(arguments: argparse.Namespace) -> Result:
    """The table of the paper's steps."""
    rows, values = [], []
    for step in LADDER.values():
        counts = None if arguments.no_cost or not step.model else _counts(step)
        numbers = ("", "") if counts is None else (f"{counts[0] / 1e6:.1f} M", f"{counts[1] / 1e9:.2f} G")
        published = "" if step.published is None else f"{step.published[0]:g} M, {step.published[1]:g} G"
        published += " in use" if step.published_in_use else ""
        rows.append(
            [
                step.name,
                step.what + (f". {step.note}" if step.note else ""),
                step.model + (", converted" if step.converts else "") if step.model else "not built",
                *numbers,
                published,
                "" if step.sparsity is None else f"{step.sparsity:g}",
                _percent(step.accuracy_120),
                _percent(step.accuracy_300),
            ]
        )
        values.append(
            {
                "name": step.name,
                "what": step.what,
                "model": step.model or None,
                "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in step.settings.items()},
                "parameters": None if counts is None else counts[0],
                "multiplications": None if counts is None else counts[1],
                "sparsity": step.sparsity,
                "accuracy_120": step.accuracy_120,
                "accuracy_300": step.accuracy_300,
                "note": step.note,
            }
        )
    headers = ["step", "what changes", "network", "parameters", "FLOPs", "published", "sparsity", "120 epochs", "300"]
    table = render_table("From SLaK to SW; all parameters and multiplications at 224 x 224, dense", headers, rows)
    return Result(table, {"steps": values})


def _counts(step: Step) -> tuple[int, int]:
    print(f"sw-transplant: counting {step.name}", file=sys.stderr)
    # Conversion looks at values, which are not there on the meta device.
    with torch.device("cpu" if step.converts else "meta"):
        model = step.build()
    found = count_cost(model)
    return found.parameters, found.multiplications


def _percent(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2f}"
