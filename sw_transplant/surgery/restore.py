"""The way back: the original module tree, with the weights as they are now."""

from __future__ import annotations

from torch import Tensor, nn

from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.copies import operand
from sw_transplant.surgery.hosts import hosts_of
from sw_transplant.surgery.origin import Origin, reason_against_dense


def restore(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Gives a converted model its original modules back: every branch a convolution with its own BatchNorm, unfolded.

    The exact inverse of :func:`convert` in mode ``"laid_out"``: the same classes, and the same state_dict, names, order
    and every bit. A model that was trained in between comes back with what it learned, and loads into the class of its
    authors. :func:`merge` gives something else: the fewest plain convolutions of the same function, BatchNorm folded.

    Args:
        model: a converted model.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The restored model: a copy, or with ``inplace`` the model itself; where it is a Shiftwise module, what that took
        the place of.

    Raises:
        ValueError: there is no Shiftwise module in the model, or one that no longer is the sum of plain convolutions
            that it replaced: in mode ``"shiftwise"``, with extra edges that have grown, with masks, reparameterized.
            The model is then left as it was.

    Example:
        >>> from torch import nn
        >>> restore(convert(nn.Sequential(nn.Conv2d(8, 8, 31, padding=15, groups=8))))[0]
        Conv2d(8, 8, kernel_size=(31, 31), stride=(1, 1), padding=(15, 15), groups=8)
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d)}
    if not layers:
        raise ValueError(
            f"restore: {type(model).__name__} has no Shiftwise module, expected a model from convert(model)"
        )
    for path, layer in layers.items():
        if reason := reason_against_dense(layer):
            raise ValueError(
                f"restore: {path or 'the model'}: {reason}; expected mode 'laid_out' without extra edges and masks. "
                "merge(model) gives plain convolutions of the same function"
            )
    target = operand(model, inplace=inplace)
    restored = {layer: _original(layer) for layer in target.modules() if isinstance(layer, ShiftwiseConv2d)}
    if isinstance(target, ShiftwiseConv2d):
        return restored[target]
    for parent in list(target.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, ShiftwiseConv2d):
                parent._modules[name] = restored[child]
    for host in hosts_of(target):
        host.follow(target)
    return target


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a converted model as the original has it, in its order: that of the restored model.

    The model is not changed and not copied; tensors that are no kernels and no biases of Shiftwise layers are its own.

    Raises:
        ValueError: as :func:`restore`.
    """
    check_restorable(model)
    state: dict[str, Tensor] = {}
    everywhere = model.named_modules(remove_duplicate=False)
    layers = {f"{path}.": module for path, module in everywhere if isinstance(module, ShiftwiseConv2d)}
    sites = {layer: _original(layer) for layer in layers.values()}
    done = set()
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in layers if name.startswith(prefix)), None)
        if prefix is None:
            state[name] = tensor
        elif prefix not in done:
            done.add(prefix)
            state |= sites[layers[prefix]].state_dict(prefix=prefix)
    return state


def check_restorable(model: nn.Module) -> None:
    """Raises ValueError where a Shiftwise module is no longer the sum of plain convolutions that it replaced."""
    for path, layer in model.named_modules():
        if isinstance(layer, ShiftwiseConv2d) and (reason := reason_against_dense(layer)):
            raise ValueError(
                f"restore: {path or 'the model'}: {reason}; expected mode 'laid_out' without extra edges and masks. "
                "merge(model) gives plain convolutions of the same function"
            )


def _original(layer: ShiftwiseConv2d) -> nn.Module:
    origin: Origin = layer.origin
    return origin.rebuild(layer)
