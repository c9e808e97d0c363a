"""What surgery works on: the model itself, or a copy that shares nothing with it."""

from __future__ import annotations

from torch import nn

from sw_transplant.find.closures import stays_with_original
from sw_transplant.layers.parameters import copy_model


def operand(model: nn.Module, *, inplace: bool) -> nn.Module:
    """The model, or a deep copy, whose parameters keep their attributes and hooks.

    Raises:
        ValueError: the model cannot be copied, or the copy would go on using a part of the model.
    """
    if inplace:
        return model
    try:
        return copy_whole(model)
    except ValueError as error:
        raise ValueError(f"{error}; pass inplace=True") from error


def copy_whole(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with the model, for what needs one; it has no ``inplace`` to advise.

    Raises:
        ValueError: as :func:`operand` does, with the reason alone.
    """
    try:
        twin = copy_model(model)
    except Exception as error:  # a foreign class may fail in any way
        raise ValueError(f"model: {type(model).__name__} cannot be copied ({type(error).__name__}: {error})") from error
    if reason := stays_with_original(twin, model):
        raise ValueError(reason)
    return twin
