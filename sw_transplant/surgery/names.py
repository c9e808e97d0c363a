"""How the parameters of a converted model are called in the original, and which of them are not to be decayed."""

from __future__ import annotations

from typing import Any

from torch import nn

from sw_transplant.find.match import Match
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d


def original_names(model: nn.Module) -> dict[str, str]:
    """What the parameters of laid-out layers were called before the conversion.

    Code that picks parameters by the names of the original (to freeze them, or to give them another learning rate)
    finds none of a converted layer. This is the way from one to the other.

    Args:
        model: a converted model; it is not changed.

    Returns:
        ``{"0.branches.0.bank": "0.weight", ...}``: banks, biases and what belongs to BatchNorms. All other parameters
        are called what they were called; the gains of extra edges, and all of mode ``"shiftwise"``, had no name.
    """
    names = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, ShiftwiseConv2d) or isinstance(layer, SWConv2d) or not isinstance(layer.match, Match):
            continue
        prefix = f"{path}." if path else ""
        for i, source in enumerate(layer.match.branches):
            parts = {"bank": source.weight, "bias": source.bias}
            branch: Any = layer.branches[i]
            for name, _ in branch.named_parameters():
                part, _, rest = name.partition(".")
                origin = parts.get(part) if part != "bn" else f"{source.bn}.{rest}"
                if origin is not None:
                    names[f"{prefix}branches.{i}.{name}"] = f"{prefix}{origin}"
    return names


def no_weight_decay(model: nn.Module) -> set[str]:
    """The parameters that weight decay should leave alone whatever their shape, for an optimizer's groups.

    They are the gains of edges, which decay would close again, and what the model itself lists, as timm's models do in
    a method of this name. Optimizers that leave all parameters of one dimension alone need no list for gains per edge.

        timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=no_weight_decay(model))

    Args:
        model: a converted model; it is not changed.

    Returns:
        Names of its parameters.
    """
    own: Any = getattr(model, "no_weight_decay", None)
    listed = set(own()) if callable(own) else set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShiftwiseConv2d):
            gains = (name for name, _ in module.named_parameters() if name.rpartition(".")[2] == "gain")
            listed.update(f"{path}.{name}" if path else name for name in gains)
    return listed
