"""sw-transplant cost: parameters, multiplications and training memory of networks."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sw_transplant.check.model_input import ModelInput
from sw_transplant.cli.load_model import InputError, load_model, one_line
from sw_transplant.cli.messages import note
from sw_transplant.cli.results import Result
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.layers.zeros import mask_zeros
from sw_transplant.science.cost import count_cost, training_bytes
from sw_transplant.sparsity.filter_sparsity import FilterSparsity
from sw_transplant.tables import render_table


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="see above")
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="weights of a single MODEL; what is zero in them is out of use"
    )
    parser.add_argument("--num-classes", type=int, metavar="N", help="outputs of the classifier; for a timm name")
    parser.add_argument(
        "--settings", metavar="JSON", help='arguments of the networks, {"width_factor": 1.5}; timm names'
    )
    parser.add_argument("--size", type=int, metavar="N", help="height and width; default: the model's")
    parser.add_argument(
        "--sparse", type=float, metavar="S", help="take the share S out of use, by SNIP on a batch of noise"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights and noise (%(default)s)")


def run_cost(arguments: argparse.Namespace) -> Result:
    """The table of costs, one row for each model."""
    if arguments.checkpoint is not None and len(arguments.models) > 1:
        raise InputError("--checkpoint belongs to one MODEL; name only one")
    if arguments.sparse is not None and not 0 < arguments.sparse < 1:
        raise InputError(f"--sparse {arguments.sparse}: expected a share above 0 and below 1")
    rows, values = [], {}
    settings = None if arguments.settings is None else _settings(arguments.settings)
    for name in arguments.models:
        loaded = load_model(
            name,
            checkpoint=arguments.checkpoint,
            num_classes=arguments.num_classes,
            seed=arguments.seed,
            settings=settings,
        )
        model, channels = loaded.model, ModelInput.of(loaded.model).shape[0]
        size = arguments.size or ModelInput.of(model).shape[1]
        try:
            if arguments.sparse is not None:
                _sparsify(model, arguments.sparse, channels, size, arguments.seed)
            elif arguments.checkpoint is not None:
                mask_zeros(model, only_L=_has_filters(model))
            cost = count_cost(model, size, channels=channels)
            memory = training_bytes(model, size, channels=channels)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"{name}: {one_line(error)}") from error
        numbers = (cost.parameters, cost.parameters_in_use, cost.multiplications, cost.multiplications_in_use)
        rows.append([name, f"{size}", *_short(*numbers), f"{memory / 2**20:.0f} MiB"])
        values[name] = {**cost.__dict__, "size": size, "training_bytes": memory}
    headers = ["network", "size", "parameters", "in use", "FLOPs", "in use", "training, per image"]
    return Result(
        render_table("Parameters, multiplications of one image, and what training keeps", headers, rows), values
    )


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--settings {text!r}: {error}; expected a JSON object") from error
    if not isinstance(settings, dict) or "num_classes" in settings:
        raise InputError(f"--settings {text!r}: expected a JSON object, without num_classes, which is --num-classes")
    return settings


def _short(parameters: int, in_use: int, multiplications: int, done: int) -> list[str]:
    return [
        f"{parameters / 1e6:.1f} M",
        f"{in_use / 1e6:.1f} M",
        f"{multiplications / 1e9:.2f} G",
        f"{done / 1e9:.2f} G",
    ]


def _has_filters(model: nn.Module) -> bool:
    return any(isinstance(module, SWConv2d) for module in model.modules())


def _sparsify(model: nn.Module, share: float, channels: int, size: int, seed: int) -> None:
    """Filters of the paper's modules, as in SW; else single weights of the whole network, as in SLaK."""
    note("SNIP scores come from two images of noise")
    sparsity = FilterSparsity(model, share, only_L=_has_filters(model), dynamics="published", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, channels, size, size, generator=generator)

    def loss() -> Any:
        logits = model(images)
        return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])

    sparsity.initialise(loss)
