"""Freezing: inference in which no call does any work on weights, compiled and captured calls included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d


def freeze(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Lets the Shiftwise layers of a model keep what they make of their parameters, for compiled calls too. In place.

    Compiled and captured calls otherwise put the kernels together in every call, form "gemm" its matrices too. A frozen
    layer has them as buffers, which are not saved: a state_dict, ``save`` and ``merge`` are as if it were not frozen.
    The plan for a size of map is made by the first call with it that is neither compiled nor captured: the one that
    this function makes, if it gets arguments. Autocast counts: freeze under the one that the calls have.

    A frozen layer refuses ``train()`` and calls that want gradients of its parameters. ``load_state_dict``, ``to`` and
    setting a form or a weight drop what it keeps, until its next call; other writes to parameters are seen by eager
    calls only. Copies and pickles stay frozen, and keep nothing before their first call.

    Args:
        model: a converted model in eval mode.
        args, kwargs: of a call of the model, which is made with them; none for no call.

    Returns:
        The model itself.

    Raises:
        ValueError: there is no Shiftwise module in the model, or it is in train mode.

    Example:
        >>> import sw_transplant as sw
        >>> x = torch.zeros(1, 8, 20, 20)
        >>> layer = sw.convert(nn.Conv2d(8, 8, 13, padding=6, groups=8)).eval()
        >>> with torch.no_grad():
        ...     compiled = torch.compile(sw.freeze(layer, x))
    """
    layers = _layers(model, "freeze")
    if any(layer.training for layer in layers):
        raise ValueError("freeze: the model is in train mode, expected eval mode: model.eval() first")
    for layer in layers:
        layer.frozen = True
    if args or kwargs:
        with torch.no_grad():
            model(*args, **kwargs)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undoes :func:`freeze`, in place: every layer is what it was. What is not frozen stays as it is.

    Returns:
        The model itself.

    Raises:
        ValueError: there is no Shiftwise module in the model.
    """
    for layer in _layers(model, "unfreeze"):
        layer.frozen = False
    return model


def _layers(model: nn.Module, caller: str) -> list[ShiftwiseConv2d]:
    layers = [module for module in model.modules() if isinstance(module, ShiftwiseConv2d)]
    if not layers:
        raise ValueError(f"{caller}: {type(model).__name__} has no Shiftwise module, expected a converted model")
    return layers
