"""sw-transplant recipe: a training as a file of settings, and the commands that run it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from sw_transplant.cli.load_model import InputError
from sw_transplant.cli.results import Result
from sw_transplant.science.recipes import DOWNSTREAM, RECIPES, Downstream, Recipe, timm_settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("name", metavar="RECIPE", nargs="?", help="default: list them all")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of a process at once (%(default)s)")


def run_recipe(arguments: argparse.Namespace) -> Result:
    """Prints a recipe, or the names of all."""
    recipes: dict[str, Recipe | Downstream] = {**RECIPES, **DOWNSTREAM}
    if arguments.name is None:
        return Result("\n".join(recipes), {"recipes": list(recipes)})
    if arguments.name not in recipes:
        raise InputError(f"{arguments.name!r}: expected one of {', '.join(recipes)}")
    recipe = recipes[arguments.name]
    if isinstance(recipe, Downstream):
        text = "\n".join(f"{key}: {value}" for key, value in asdict(recipe).items())
        return Result(text, asdict(recipe))
    if min(arguments.gpus, arguments.batch_size) < 1 or recipe.batch_size % (arguments.gpus * arguments.batch_size):
        raise InputError(
            f"--gpus {arguments.gpus} and --batch-size {arguments.batch_size}: expected a product that divides the "
            f"recipe's batch of {recipe.batch_size}"
        )
    settings = timm_settings(recipe, processes=arguments.gpus, batch_size=arguments.batch_size)
    yaml = "\n".join(f"{key}: {_in_yaml(value)}" for key, value in settings.items())
    run = f"torchrun --nproc-per-node={arguments.gpus}"
    lines = [
        "# With pruning, EMA of masked weights and all else of the recipe:",
        f"#   {run} examples/train_imagenet.py {arguments.name} --data IMAGENET --batch-size {arguments.batch_size}",
        "# Dense, by timm's own script (import sw_transplant.models in it, which registers the network):",
        f"#   {run} train.py IMAGENET --config {arguments.name}.yaml",
        f"# {recipe.epochs} epochs: timm adds warmup_epochs to epochs where warmup_prefix is set.",
        yaml,
    ]
    if recipe.pruning is not None:
        lines.insert(0, f"# pruning: {recipe.pruning}")
    return Result("\n".join(lines), {"recipe": asdict(recipe), "timm": settings})


def _in_yaml(value: object) -> str:
    """As YAML 1.1 reads it: there a number with an exponent has a point."""
    text = str(value)
    return text.replace("e-", ".0e-") if isinstance(value, float) and "." not in text else text
