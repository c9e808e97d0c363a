"""Finds what can be converted: from a model to matches and to skipped layers with their reasons. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from sw_transplant.config import SWConfig
from sw_transplant.find.closures import held_beside, identity
from sw_transplant.find.code import reached, switches
from sw_transplant.find.describe import channels_of, describe, stride_of
from sw_transplant.find.linear import LinearBranch, NotLinearError, linear_branches
from sw_transplant.find.match import Inspection, Match, Skipped, join_path
from sw_transplant.find.notes import notes_on
from sw_transplant.find.parameters import reason_against_parameters
from sw_transplant.find.proof import difference
from sw_transplant.find.rules import (
    conv_geometry,
    has_own_forward,
    interference,
    is_depthwise,
    kernel_of,
    looks_like_conv,
    overridden,
    reason_against,
)
from sw_transplant.find.select import Select, selector
from sw_transplant.find.shared import reason_against_sharing
from sw_transplant.find.traces import attributes_of
from sw_transplant.geometry import Size
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d


def inspect_model(model: nn.Module, config: SWConfig | None = None, *, select: Select = None) -> Inspection:
    """The dry run of :func:`sw_transplant.surgery.convert`: what would be converted, and what would not and why.

    Args:
        model: any module. It is not changed and not run; of a convolution class with a forward of its own, a copy of
            the layer is run on small random maps.
        config: as for ``convert``; None for ``SWConfig()``.
        select: as for ``convert``: glob patterns of layer paths, or a function ``(path, module) -> bool``.

    Returns:
        ``matches``, ``skipped`` and ``converted`` (layers that are Shiftwise already); prints as tables.

    Raises:
        ValueError: ``model`` is no module, or a pattern of ``select`` names nothing.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected an nn.Module")
    if config is not None and not isinstance(config, SWConfig):
        raise ValueError(
            f"config: got {type(config).__name__} {config!r:.60}, expected an SWConfig: SWConfig(tile=3), say"
        )
    return _Search(model, config or SWConfig(), select).run()


class _Search:
    """The modules of a model, every place that holds each, and what the search has found so far."""

    def __init__(self, model: nn.Module, config: SWConfig, select: Select) -> None:
        self.model, self.config = model, config
        self.modules = {module: path for path, module in model.named_modules()}
        self.places: dict[nn.Module, list[tuple[nn.Module | None, str]]] = {model: [(None, "")]}
        owners: dict[Tensor, list[str]] = {}
        for parent, path in self.modules.items():
            if isinstance(parent, torch.jit.ScriptModule):
                continue
            for name, child in parent._modules.items():
                if child is not None:
                    self.places.setdefault(child, []).append((parent, join_path(path, name)))
            for name, parameter in parent.named_parameters(recurse=False, remove_duplicate=False):
                owners.setdefault(parameter, []).append(join_path(path, name))
        self.held = held_beside(model)
        self.tied = {parameter: names for parameter, names in owners.items() if len(names) > 1}
        self.selected = selector(list(self.modules.values()), select)
        self.sums: dict[nn.Module, list[LinearBranch] | NotLinearError] = {}
        self.claimed: set[nn.Module] = set()  # all modules of a site, of a Shiftwise or of a TorchScript module
        self.sites: dict[nn.Module, list[LinearBranch]] = {}
        self.proofs: dict[Any, str | None] = {}  # what the proof of such a site has found
        self.left: list[tuple[nn.Module, Skipped]] = []
        self.kept_apart: set[nn.Module] = set()  # sums whose convolutions are replaced one by one

    def run(self) -> Inspection:
        converted = []
        for module, path in self.modules.items():  # parents come before their children
            if module in self.claimed:
                continue
            if isinstance(module, ShiftwiseConv2d):
                converted.append(path)
                self.claimed.update(module.modules())
            elif isinstance(module, torch.jit.ScriptModule):
                self._consider_script(module)
            elif looks_like_conv(module):
                self._consider_conv(module)
            elif not isinstance(module, ParametrizationList):  # reported with the layer that it belongs to
                self._consider_functional(module)
        matches = [self._described(site, branches) for site, branches in self.sites.items()]
        skipped = [entry for module, entry in self.left if module not in self.claimed]
        if self.config.mode == "shiftwise":
            pairs = zip(matches, self.sites, strict=True)
            reasons = {match: reason_against_sharing(match, site, self.config) for match, site in pairs}
            matches = [match for match, reason in reasons.items() if reason is None]
            for match, reason in reasons.items():
                if reason is not None:
                    kernel = max(branch.geometry.kernel_size for branch in match.branches)
                    skipped.append(Skipped(match.path, match.type_name, kernel, reason))
        notes = notes_on(self.model, list(self.sites)) if matches else []
        return Inspection(tuple(matches), tuple(skipped), tuple(converted), tuple(notes))

    # ---- candidates ----

    def _consider_conv(self, conv: nn.Module) -> None:
        kernel = kernel_of(conv)
        if not self._is_large(conv):
            if is_depthwise(conv) and max(kernel) > 1:
                self._leave(conv, kernel, f"kernel smaller than min_kernel = {self.config.min_kernel}")
        elif (
            reason := reason_against(conv) or self._in_use_elsewhere(conv, {conv}) or reached(conv, self._holders(conv))
        ):
            self._leave(conv, kernel, reason)
        elif not self.selected(self.modules[conv], conv):
            self._leave(conv, kernel, "left out by select")
        else:
            assert isinstance(conv, nn.Conv2d)  # for mypy: reason_against refuses all else
            bias = None if conv.bias is None else "bias"
            stride = (conv.stride[0], conv.stride[1])
            channels = (conv.in_channels, conv.out_channels)
            branches = [LinearBranch("weight", bias, None, conv_geometry(conv), stride, channels)]
            if has_own_forward(conv) and (reason := self._disproof(conv, branches)):
                self._leave(conv, kernel, f"class {type(conv).__name__} has a forward of its own: {reason}")
            else:
                self._claim(conv, branches)

    def _consider_functional(self, module: nn.Module) -> None:
        """A module of another class that holds a parameter of the shape of a large depthwise kernel."""
        kernel = _large_depthwise_parameter(module.parameters(recurse=False), self.config.min_kernel)
        if kernel is None:
            return
        branches = self._sum(module)
        if isinstance(branches, NotLinearError):
            reason = (
                f"it holds a parameter of the shape of a large depthwise kernel, but {branches}; "
                "a module whose whole forward is that convolution can be converted"
            )
            self._leave(module, kernel, reason)
        elif reason_ := self._reason_against_sum(module, branches):
            self._leave(module, kernel, reason_)
        elif not self.selected(self.modules[module], module):
            self._leave(module, kernel, "left out by select")
        elif len(branches) > 1 and not self.config.merge_parallel:
            self._leave(module, kernel, "its forward is a sum, and merge_parallel is False")
        elif reason_ := self._disproof(module, branches):
            self._leave(module, kernel, reason_)
        else:
            self._claim(module, branches)

    def _consider_script(self, module: nn.Module) -> None:
        kernel = _large_depthwise_parameter(module.parameters(), self.config.min_kernel)
        if kernel is not None:
            self._leave(module, kernel, interference(module) or "")
        self.claimed.update(set(module.modules()) - {module})

    def _is_large(self, conv: nn.Module) -> bool:
        return max(kernel_of(conv)) >= self.config.min_kernel

    def _leave(self, module: nn.Module, kernel: tuple[int, ...], reason: str) -> None:
        self.left.append((module, Skipped(self.modules[module], type(module).__name__, kernel, reason)))

    # ---- from a candidate to the module that is replaced ----

    def _claim(self, module: nn.Module, branches: list[LinearBranch]) -> None:
        """Takes the module around the candidate whose forward is the largest sum of parallel branches, else itself."""
        site = module
        for caller, above in reversed(self._sums_around(module, branches)):
            reason = self._reason_against_sum(caller, above) or self._disproof(caller, above)
            if reason is None:
                site, branches = caller, above
                break
            if caller not in self.kept_apart:
                self.kept_apart.add(caller)
                kernel = max(b.geometry.kernel_size for b in above)
                self._leave(caller, kernel, f"not replaced as one sum, but its convolutions one by one: {reason}")
        self.sites[site] = branches
        self.claimed.update(site.modules())

    def _sums_around(
        self, module: nn.Module, branches: list[LinearBranch]
    ) -> list[tuple[nn.Module, list[LinearBranch]]]:
        """The modules above that are sums of ever more branches, nearest first."""
        larger: list[tuple[nn.Module, list[LinearBranch]]] = []
        for caller in self._callers(module) if self.config.merge_parallel else ():
            above = self._sum(caller)
            if isinstance(above, NotLinearError):
                break
            if len(above) > len(larger[-1][1] if larger else branches):
                larger.append((caller, above))
        return larger

    def _disproof(self, site: nn.Module, branches: list[LinearBranch]) -> str | None:
        """What the site does beside the sum that was read, found by running a copy; None for nothing.

        Sites that are made alike are tried once.
        """
        key = _likeness(site, branches)
        if key not in self.proofs:
            self.proofs[key] = difference(site, replace(self._described(site, branches), edges=1))
        return self.proofs[key]

    def _described(self, site: nn.Module, branches: list[LinearBranch]) -> Match:
        paths = [path for _, path in self.places[site] if path != self.modules[site]]
        return describe(site, [self.modules[site], *paths], branches, self.config)

    def _holders(self, module: nn.Module) -> list[nn.Module]:
        """All modules around one, in every place that holds it, nearest first."""
        found: dict[nn.Module, None] = {}
        waiting = [module]
        while waiting:
            parents = [parent for parent, _ in self.places[waiting.pop(0)] if parent is not None]
            waiting += [parent for parent in parents if parent not in found]
            found.update(dict.fromkeys(parents))
        return list(found)

    def _callers(self, module: nn.Module) -> Iterator[nn.Module]:
        """The modules above, nearest first, without containers; ends where a module is held in several places."""
        while len(self.places[module]) == 1:
            parent = self.places[module][0][0]
            if parent is None:
                return
            module = parent
            if type(module).forward is not nn.Module.forward:
                yield module

    def _sum(self, module: nn.Module) -> list[LinearBranch] | NotLinearError:
        if module not in self.sums:
            try:
                self.sums[module] = linear_branches(module)
            except NotLinearError as error:
                self.sums[module] = error
        return self.sums[module]

    def _reason_against_sum(self, module: nn.Module, branches: list[LinearBranch]) -> str | None:
        """Why a module whose forward is a sum of branches cannot be replaced as a whole; None if it can."""
        inside = set(module.modules())
        for inner in inside:
            if reason := self._in_use_elsewhere(inner, inside):
                return reason
            if inner is not module and any(parent not in inside for parent, _ in self.places[inner]):
                return f"its part {self.modules[inner]} is also used elsewhere"
            if looks_like_conv(inner) and self._is_large(inner) and not self.selected(self.modules[inner], inner):
                return f"its part {self.modules[inner]} is left out by select"
        named = [name for b in branches for name in (b.weight, b.bn) if name is not None]
        if twice := next((name for name in named if named.count(name) > 1), ""):
            return f"its forward uses {twice} twice"
        vanishing = [inner for inner in inside if not isinstance(inner, _BatchNorm)]
        for inner in vanishing:
            if reason := overridden(inner) or switches(inner):
                return reason
        if reason := reached(module, self._holders(module)):
            return reason
        used = {name for b in branches for name in (b.weight, b.bias) if name is not None}
        used |= {
            f"{b.bn}.{name}" for b in branches if b.bn for name, _ in module.get_submodule(b.bn).named_parameters()
        }
        held = {name for name, _ in module.named_parameters()}
        if held != used:
            return f"it holds parameters that its forward does not use: {sorted(held - used)[:3]}"
        if len({(p.dtype, p.device) for p in module.parameters()}) > 1:
            return "its parameters differ in dtype or device"
        sources = [b for b in branches if b.weight is not None]
        if len({(b.stride, b.channels) for b in sources}) != 1:
            return "its convolutions differ in stride or channels"
        stride, channels = stride_of(sources), channels_of(sources)
        if len(sources) < len(branches) and (stride != (1, 1) or channels[0] != channels[1]):
            return "it adds its input to a convolution that changes the size or the channels"
        if stride != (1, 1) and any(b.geometry.padding == "same" for b in branches):
            return "its padding depends on the size of the map"
        if len({b.geometry.growth for b in branches}) > 1:
            return "its branches give outputs of different sizes"
        return None

    def _in_use_elsewhere(self, module: nn.Module, site: set[nn.Module]) -> str | None:
        parts: list[tuple[str, nn.Module | Tensor]] = [("it", module), *module.named_parameters(recurse=False)]
        for what, each in parts:
            held = self.held.get(identity(each), ())
            # A replacement keeps the hooks, and nothing else of what the site's own parts hold.
            if place := next((place for holder, place in held if holder not in site or place.endswith("_hooks")), ""):
                return f"{place} holds {what}, too, and would go on using it"
        for parameter in module.parameters(recurse=False):
            if parameter in self.tied:
                return f"its weights are tied: {' and '.join(self.tied[parameter])} are one parameter"
        if isinstance(module, _BatchNorm):  # which the replacement takes over as it is
            return None
        parameters = dict(module.named_parameters(recurse=False))
        return reason_against_parameters(parameters, mode=self.config.mode, edges=self.config.edge_count)


def _likeness(site: nn.Module, branches: list[LinearBranch]) -> Any:
    """Equal for sites that do the same on the same values: classes, settings, modes, shapes, and what reading found."""
    parts = tuple((path, type(part), part.training) for path, part in site.named_modules())
    shapes = tuple((name, p.shape, p.dtype, p.device) for name, p in site.named_parameters())
    buffers = tuple(
        (path, name, id(buffer))
        for path, part in site.named_modules()
        if not isinstance(part, _BatchNorm)
        for name, buffer in part.named_buffers(recurse=False)
    )
    return parts, shapes, buffers, tuple(branches), tuple(sorted(attributes_of(site).items()))


def _large_depthwise_parameter(parameters: Iterator[nn.Parameter], min_kernel: int) -> Size | None:
    """Kernel size of the first parameter of shape (C > 1, 1, kh, kw) with a large kernel."""
    for parameter in parameters:
        if isinstance(parameter, nn.UninitializedParameter) or parameter.dim() != 4:
            continue
        channels, one, kh, kw = parameter.shape
        if channels > 1 and one == 1 and max(kh, kw) >= min_kernel:
            return kh, kw
    return None
