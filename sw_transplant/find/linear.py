"""Reads a module's forward: is it a sum of depthwise convolutions (and BatchNorms) of one input?

The forward runs on a stand-in for the map that writes down what is done to it. It runs on a copy whose parameters are
on the meta device: whatever it does to them, the model keeps its values; and as nothing is patched, other threads may
run or convert models meanwhile. One run sees one path through Python, so what is read is a proposal:
:mod:`sw_transplant.find.proof` tests it. docs/design/finding.md has the whole story.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sw_transplant.find.rules import conv_geometry, interference, reason_against, static_padding
from sw_transplant.find.traces import undisturbed
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


_IDENTITY = LinearBranch(None, None, None, BranchGeometry((1, 1), (0, 0, 0, 0)), None, None)


def linear_branches(module: nn.Module) -> list[LinearBranch]:
    """The depthwise convolutions whose sum is the module's forward, in train mode and in eval mode alike.

    Args:
        module: any module. What runs is a copy without values; the module is not changed, and no random state is.

    Returns:
        The branches in the order of their sum.

    Raises:
        NotLinearError: the forward cannot be read, or does anything else; or a part has hooks or the like.
    """
    for inner in module.modules():
        if reason := interference(inner):
            raise NotLinearError(reason)
    if (inputs := len(inspect.signature(module.forward).parameters)) != 1:
        raise NotLinearError(f"its forward takes {inputs} inputs")
    train, again, evaluation = (_read(module, mode) for mode in (True, True, False))
    if train != again:
        raise NotLinearError("its forward differs from call to call")
    if train != evaluation:
        raise NotLinearError("its forward differs between train and eval mode")
    return train


def _read(module: nn.Module, training: bool) -> list[LinearBranch]:
    try:
        with undisturbed(module) as draws:
            twin = copy_without_values(module).train(training)
            _record(twin, module)
            result = twin.forward(_Map(None, twin))
            drawn = draws.any
    except NotLinearError:
        raise
    except Exception as error:  # user code that gets something else than a tensor may fail in any way
        raise NotLinearError(f"its forward cannot be read ({type(error).__name__}: {error!s:.80})") from error
    if drawn:
        raise NotLinearError("its forward draws random numbers")
    if not isinstance(result, _Map) or result.parts is None:
        raise NotLinearError("its output is not one sum")
    return list(result.parts)


def copy_without_values(module: nn.Module) -> nn.Module:
    """A deep copy with parameters on the meta device: cheap, and safe to run."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        empty.__dict__.update(vars(parameter))
        memo[id(parameter)] = empty
    return copy.deepcopy(module, memo)


def _record(twin: nn.Module, original: nn.Module) -> None:
    """Lets convolutions and BatchNorms write down that they were called, in place of their forward.

    What they are is asked of the original, which has values.
    """
    for path, part in twin.named_modules():
        if path and isinstance(part, (nn.Conv2d, _BatchNorm, nn.Identity)):
            part.__dict__["forward"] = functools.partial(_call_part, path, original.get_submodule(path))


class _Map:
    """Stands for a map in a forward.

    Attributes:
        parts: the branches whose sum it is; None for the input itself.
        root: the module that is read; it tells which tensors are its parameters.
    """

    def __init__(self, parts: Sequence[LinearBranch] | None, root: nn.Module) -> None:
        self.__dict__.update(parts=parts, root=root)

    def __getattr__(self, name: str) -> NoReturn:
        raise NotLinearError(f"its forward asks its input for {name}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise NotLinearError(f"its forward sets {name} of its input")

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise NotLinearError("its forward does more with its input than to convolve and to add")

    __bool__ = __len__ = __iter__ = __getitem__ = __setitem__ = __eq__ = __ne__ = __lt__ = __gt__ = __le__ = _refuse  # type: ignore[assignment]
    __ge__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __neg__ = __matmul__ = __pow__ = _refuse  # type: ignore[assignment]
    __imul__ = __isub__ = __itruediv__ = __float__ = __int__ = __index__ = __contains__ = _refuse  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __add__(self, other: Any) -> _Map:
        if isinstance(other, (int, float)) and other == 0:  # sums that start from 0
            return self
        if not isinstance(other, _Map):
            raise NotLinearError("its forward adds something else than branches")
        mine, theirs = ([_IDENTITY] if each.parts is None else each.parts for each in (self, other))
        return _Map([*mine, *theirs], self.root)

    __radd__ = __iadd__ = add = add_ = __add__

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> _Map:
        if function is torch.add and len(args) == 2 and not kwargs:
            return args[0] + args[1]  # type: ignore[no-any-return]
        if function in (F.conv2d, torch.conv2d):
            return _functional_conv(args, kwargs or {})
        raise NotLinearError(f"its forward calls {getattr(function, '__name__', function)}")


def _call_part(path: str, module: nn.Module, x: Any) -> _Map:
    """What a part makes of a stand-in; ``module`` is the original of the part."""
    if not isinstance(x, _Map):
        raise NotLinearError(f"its forward calls {path} on something else than its input or a sum")
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, nn.Conv2d):
        reason = reason_against(module)
        if reason or x.parts is not None:
            raise NotLinearError(reason or f"{path} convolves something else than the input")
        bias = None if module.bias is None else f"{path}.bias"
        stride, channels = (module.stride[0], module.stride[1]), (module.in_channels, module.out_channels)
        return _Map([LinearBranch(f"{path}.weight", bias, None, conv_geometry(module), stride, channels)], x.root)
    if is_affine_batch_norm(module):
        if x.parts is None:
            return _Map([replace(_IDENTITY, bn=path)], x.root)
        if len(x.parts) == 1 and x.parts[0].bn is None:
            return _Map([replace(x.parts[0], bn=path)], x.root)
    raise NotLinearError(f"its forward calls {type(module).__name__} ({path})")


def is_affine_batch_norm(module: nn.Module) -> bool:
    """BatchNorm2d, SyncBatchNorm, or a subclass whose extra layers (activation, dropout) are all the identity."""
    if isinstance(module, (nn.LazyBatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d)) or not isinstance(module, _BatchNorm):
        return False
    plain = type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    extras = list(module.children())
    return plain or (bool(extras) and all(type(extra) is nn.Identity for extra in extras))


def _functional_conv(args: Sequence[Any], kwargs: dict[str, Any]) -> _Map:
    """F.conv2d of the input with parameters of the module as weight and bias."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call |= dict(zip(names, args, strict=False)) | kwargs
    x, kernel = call["input"], call["weight"]
    if not isinstance(x, _Map) or x.parts is not None:
        raise NotLinearError("its forward calls conv2d on something else than its input")
    weight, bias = (_name_of(call[name], x.root) for name in ("weight", "bias"))
    if weight is None or (call["bias"] is not None and bias is None):
        raise NotLinearError("its forward calls conv2d with a weight or bias that is no parameter of it")
    groups, out_channels = call["groups"], kernel.shape[0]
    if kernel.dim() != 4 or kernel.shape[1] != 1 or groups < 2 or out_channels % groups:
        raise NotLinearError(f"its forward calls conv2d with groups={groups} and a weight {tuple(kernel.shape)}")
    size, dilation = (kernel.shape[2], kernel.shape[3]), _pair(call["dilation"])
    geometry = BranchGeometry(size, static_padding(call["padding"], size, dilation), dilation)
    return _Map([LinearBranch(weight, bias, None, geometry, _pair(call["stride"]), (groups, out_channels))], x.root)


def _name_of(tensor: Any, root: nn.Module) -> str | None:
    """Which parameter of the module a tensor is; None where it is none."""
    if not isinstance(tensor, Tensor):
        return None
    return next((name for name, parameter in root.named_parameters() if parameter is tensor), None)


def _pair(value: Any) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
