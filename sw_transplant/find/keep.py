"""What a layer keeps of the module whose place it takes, beside its function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sw_transplant.find.match import Match
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d

_OF_EVERY_CONVOLUTION = frozenset(vars(nn.Conv2d(1, 1, 1, device="meta")))


def keep_attributes(layer: ShiftwiseConv2d, site: nn.Module, match: Match) -> None:
    """Gives a layer the plain attributes of what it replaces: flags that somebody set, and padding as it was written.

    Left out are attributes that every convolution has, those that the layer has itself, and what holds modules or
    parameters, which are no longer there.

    Args:
        layer: changed in place.
        site: what it takes the place of.
        match: how the site is made.
    """
    for name, value in vars(site).items():
        known = name in _OF_EVERY_CONVOLUTION or hasattr(layer, name)
        if not known and not _holds_parts(value):
            layer.__dict__[name] = value
            layer.flags = (*layer.flags, name)
    (source, *others), branches = match.branches, layer.parts()
    if others or source.weight is None or len(branches) > 1 or branches[0].geometry != source.geometry:
        return
    owner = site.get_submodule(source.weight.rpartition(".")[0])
    if isinstance(owner, nn.Conv2d):
        layer.stated_padding = owner.padding


def give_back_attributes(plain: nn.Module, layer: ShiftwiseConv2d) -> None:
    """Gives what takes the place of a layer the flags that the layer kept, with the values that they have now."""
    for name in layer.flags:
        if name in vars(layer) and name not in vars(plain):
            plain.__dict__[name] = vars(layer)[name]


def _holds_parts(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_parts, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_holds_parts, value))
    return isinstance(value, nn.Module) or (isinstance(value, Tensor) and isinstance(value, nn.Parameter))
