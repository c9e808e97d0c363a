"""Reads a module's forward with torch.fx: is it a sum of depthwise convolutions (and BatchNorms) of one input?

FX is used for reading only; nothing that it makes becomes part of a model. What is traced is a copy, because a trace
that fails can leave its Proxies behind in the module. How a forward is read: docs/design/finding.md.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sw_transplant.find.rules import conv_geometry, interference, reason_against, static_padding
from sw_transplant.geometry import BranchGeometry, Size


class NotLinearError(Exception):
    """The forward is more than a sum of depthwise convolutions of one input; the message says what was met."""


@dataclass(frozen=True)
class LinearBranch:
    """One summand of a forward; paths as in :class:`match.SourceBranch`. ``stride`` is None for the identity."""

    weight: str | None
    bias: str | None
    bn: str | None
    geometry: BranchGeometry
    stride: Size | None
    channels: tuple[int, int] | None


_INPUT = "input"
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_CONVOLUTIONS = (F.conv2d, torch.conv2d)


def linear_branches(module: nn.Module) -> list[LinearBranch]:
    """The depthwise convolutions whose sum is the module's forward, in train mode and in eval mode alike.

    Args:
        module: any module. It is copied (parameters are shared with the copy, buffers are not) and not changed.

    Returns:
        The branches in the order of their sum.

    Raises:
        NotLinearError: the forward cannot be traced, or does anything else; or a part has hooks or the like.
    """
    for inner in module.modules():
        if reason := interference(inner):  # not even traced: that would call the hooks
            raise NotLinearError(reason)
    train, evaluation = (_read(module, mode) for mode in (True, False))
    if train != evaluation:
        raise NotLinearError("its forward differs between train and eval mode")
    return train


class _LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (nn.Conv2d, _BatchNorm)) or super().is_leaf_module(module, qualified_name)


def _read(module: nn.Module, training: bool) -> list[LinearBranch]:
    try:
        twin = structural_copy(module).train(training)
        graph = _LeafTracer().trace(twin)
    except Exception as error:  # user code under a tracer may fail in any way
        raise NotLinearError(f"its forward cannot be traced ({type(error).__name__}: {error!s:.80})") from error
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise NotLinearError(f"its forward takes {len(placeholders)} inputs")
    values: dict[torch.fx.Node, Any] = {placeholders[0]: _INPUT}
    for node in graph.nodes:
        if node.op == "output":
            result = values.get(node.args[0]) if isinstance(node.args[0], torch.fx.Node) else None
            if not isinstance(result, list):
                raise NotLinearError("its output is not one sum")
            return result
        if node.op != "placeholder":
            values[node] = _step(twin, node, values)
    raise NotLinearError("its forward returns nothing")


def _step(root: nn.Module, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
    """The value of one node: the input, a sum (list) of branches, or the name of a parameter (tuple)."""
    operands = [values[arg] if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
    if node.op == "get_attr":
        return ("attribute", node.target)
    if node.op == "call_module" and len(operands) == 1 and not node.kwargs:
        return _call_module(str(node.target), root.get_submodule(str(node.target)), operands[0])
    added = (node.op == "call_function" and node.target in _ADDITIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    if added and len(operands) == 2 and not node.kwargs:
        return _add(*operands)
    if node.op == "call_function" and node.target in _CONVOLUTIONS:
        kwargs = {key: values[arg] if isinstance(arg, torch.fx.Node) else arg for key, arg in node.kwargs.items()}
        return _functional_conv(root, operands, kwargs)
    raise NotLinearError(f"its forward calls {getattr(node.target, '__name__', node.target)}")


def _call_module(path: str, module: nn.Module, operand: Any) -> Any:
    if isinstance(module, nn.Identity):
        return operand
    if isinstance(module, nn.Conv2d):
        reason = reason_against(module)
        if reason or operand != _INPUT:
            raise NotLinearError(reason or f"{path} convolves something else than the input")
        bias = None if module.bias is None else f"{path}.bias"
        stride = (module.stride[0], module.stride[1])
        channels = (module.in_channels, module.out_channels)
        return [LinearBranch(f"{path}.weight", bias, None, conv_geometry(module), stride, channels)]
    if is_affine_batch_norm(module):
        if operand == _INPUT:
            return [replace(_IDENTITY, bn=path)]
        if isinstance(operand, list) and len(operand) == 1 and operand[0].bn is None:
            return [replace(operand[0], bn=path)]
    raise NotLinearError(f"its forward calls {type(module).__name__} ({path})")


_IDENTITY = LinearBranch(None, None, None, BranchGeometry((1, 1), (0, 0, 0, 0)), None, None)


def is_affine_batch_norm(module: nn.Module) -> bool:
    """BatchNorm2d, SyncBatchNorm, or a subclass whose extra layers (activation, dropout) are all the identity."""
    if isinstance(module, (nn.LazyBatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d)) or not isinstance(module, _BatchNorm):
        return False
    plain = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    extras = list(module.children())
    return plain or (bool(extras) and all(type(extra) is nn.Identity for extra in extras))


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, (int, float)) and a == 0:  # sums that start from 0
        return b
    if isinstance(b, (int, float)) and b == 0:
        return a
    parts = [[_IDENTITY] if part == _INPUT else part for part in (a, b)]
    if not all(isinstance(part, list) for part in parts):
        raise NotLinearError("its forward adds something else than branches")
    return parts[0] + parts[1]


def _functional_conv(root: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> list[LinearBranch]:
    """F.conv2d with parameters of the module as weight and bias."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call |= dict(zip(names, args, strict=False)) | kwargs
    weight, bias = (call[name][1] if isinstance(call[name], tuple) else None for name in ("weight", "bias"))
    if call["input"] != _INPUT or weight is None or (call["bias"] is not None and bias is None):
        raise NotLinearError("its forward calls conv2d on something else than the input and a parameter")
    parameters = dict(root.named_parameters())
    kernel = parameters.get(weight)
    settings = (call["stride"], call["padding"], call["dilation"], call["groups"])
    if (
        kernel is None
        or (bias is not None and bias not in parameters)
        or any(isinstance(s, torch.fx.Node) for s in settings)
    ):
        raise NotLinearError("its forward calls conv2d with a weight, bias or setting that is not fixed")
    groups, out_channels = call["groups"], kernel.shape[0]
    if kernel.shape[1] != 1 or groups < 2 or out_channels % groups:
        raise NotLinearError(f"its forward calls conv2d with groups={groups} and a weight {tuple(kernel.shape)}")
    size, dilation = (kernel.shape[2], kernel.shape[3]), _pair(call["dilation"])
    geometry = BranchGeometry(size, static_padding(call["padding"], size, dilation), dilation)
    return [LinearBranch(weight, bias, None, geometry, _pair(call["stride"]), (groups, out_channels))]


def _pair(value: Any) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def structural_copy(module: nn.Module) -> nn.Module:
    """A deep copy that shares the parameters: cheap, and safe to trace or to run without gradients."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
