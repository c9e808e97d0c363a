"""What a layer took the place of: the original module without its weights, kept so that it can be made again.

A converted layer knows its kernels, biases and BatchNorms. It does not know the tree that they came from: classes,
names and their order, settings, and the parts that do nothing. :class:`Origin` is that tree with every tensor on the
meta device. It is no submodule of the layer: it has nothing to train, to move or to save, and costs no memory to speak
of. With it a layer gives its original back, and reads weights that have the original's names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.equivalence import assemble, grid_placements, lay_out
from sw_transplant.find.match import Match, SourceBranch
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.ops.depthwise import is_channels_last
from sw_transplant.surgery.savers import STAND_IN, watch_savers


class Origin:
    """The module that a layer took the place of, its weights and BatchNorms on the meta device.

    Args:
        site: the module; it is copied and not changed. Other buffers than those of its BatchNorms are copied too.
        match: how the site is made.
    """

    def __init__(self, site: nn.Module, match: Match) -> None:
        self.training = site.training
        norms = [site.get_submodule(branch.bn) for branch in match.branches if branch.bn is not None]
        tensors = [*site.parameters(), *(buffer for norm in norms for buffer in norm.buffers())]
        self.site = copy.deepcopy(site, {id(tensor): _without_values(tensor) for tensor in tensors})

    def rebuild(self, layer: ShiftwiseConv2d) -> nn.Module:
        """The original module, with the kernels, biases and BatchNorms that the layer has now.

        Args:
            layer: the one that took its place, of which :func:`reason_against_dense` has nothing to say. It is not
                changed; its BatchNorms become parts of the result.
        """
        given: dict[int, Any] = {}  # what a deep copy takes instead, by the identity of what is in the skeleton
        norms: set[nn.Module] = set()
        like: Tensor = layer._like
        skeleton = dict(self.site.named_parameters(remove_duplicate=False))
        for branch, source in zip(branches_of(layer), layer.match.branches, strict=True):
            if source.weight is not None:
                kernel = dense_kernel(branch, source)
                given[id(skeleton[source.weight])] = nn.Parameter(kernel, requires_grad=branch.bank.requires_grad)
            if source.bias is not None:
                bias: nn.Parameter = branch.bias  # type: ignore[assignment]
                values = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
                given[id(skeleton[source.bias])] = values
            if source.bn is not None and branch.bn is not None:
                given[id(self.site.get_submodule(source.bn))] = branch.bn
                norms.update(branch.bn.modules())
        cast = {parameter.dtype for parameter in skeleton.values()} != {like.dtype}
        site: nn.Module = copy.deepcopy(self.site, given)
        for module in site.modules():
            if module in norms:
                continue  # its mode and its statistics are its own
            if layer.training != self.training:
                module.training = layer.training
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    dtype = like.dtype if cast and buffer.is_floating_point() else buffer.dtype
                    module._buffers[name] = buffer.to(like.device, dtype)
        return site

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that the layer has no use for (no BatchNorm's), by their names in the original."""
        return ((name, buffer) for name, buffer in self.site.named_buffers() if not buffer.is_meta)


def remember(layer: ShiftwiseConv2d, site: nn.Module, match: Match) -> None:
    """Gives a layer its :class:`Origin`, and lets ``load_state_dict`` take weights with the original's names.

    Args:
        layer: changed in place.
        site: the module that it takes the place of; one that cannot be copied is not remembered.
        match: how the site is made.
    """
    if not isinstance(layer, SWConv2d):  # the paper's module is another function: nothing leads back
        try:
            layer.origin = Origin(site, match)
        except Exception:  # a foreign class may fail in any way; it is asked for again when the way back is taken
            layer.origin = None
    layer.register_load_state_dict_pre_hook(_read_original_names)
    watch_savers(layer)


def branches_of(layer: ShiftwiseConv2d) -> list[Branch]:
    return list(layer.branches)  # type: ignore[arg-type]


def reason_against_dense(layer: ShiftwiseConv2d) -> str | None:
    """Why a layer is no longer the sum of plain convolutions that it took the place of; None if it is."""
    if isinstance(layer, SWConv2d):
        return "it is the paper's module (mode 'shiftwise'), which made another function of the original kernels"
    if layer.match is None:
        return "it was reparameterized or built by hand, so that what it replaced is not known"
    if layer.origin is None:
        return f"it replaced a {layer.match.type_name} that could not be copied"
    for i, (branch, source) in enumerate(zip(branches_of(layer), layer.match.branches, strict=True)):
        if branch.mask is not None and not bool(branch.mask.all()):
            return f"branch {i} has a mask that leaves tiles out"
        if branch.gain is None or source.weight is None:
            continue
        first, others = branch.gain[0], branch.gain[1:]
        if not bool((first == 1).all()) or bool(others.any()):
            return f"branch {i} has extra edges, which have grown (their gains are not 1, 0, 0, ...)"
        tiles, _ = lay_out(dense_kernel(branch, source), source.tile)
        if not torch.equal(tiles, branch.bank):
            return f"branch {i} has grown beyond the original kernel: its last tiles are no longer filled with zeros"
    return None


def is_stored_dense(layer: ShiftwiseConv2d) -> bool:
    """Whether the original's weights say all there is to say of the layer: no edges, no masks."""
    plain = layer.origin is not None and layer.match is not None
    return plain and all(branch.gain is None and branch.mask is None for branch in branches_of(layer))


@torch.no_grad()
def dense_kernel(branch: Branch, source: SourceBranch) -> Tensor:
    """The kernel ``(C_out, 1, kh, kw)`` of a laid-out branch, without its BatchNorm: the inverse of laying it out."""
    size = source.geometry.kernel_size
    kernel = assemble(branch.bank.detach(), grid_placements(size, source.tile), size)
    if is_channels_last(branch.bank):  # of a single channel, contiguous() would leave the strides as they are
        kernel = torch.empty_like(kernel, memory_format=torch.channels_last).copy_(kernel)
    return kernel


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _read_original_names(
    layer: ShiftwiseConv2d,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Turns weights with the names of the original module into those of the layer, in place, before they are loaded.

    Any part of them will do: a checkpoint may be cut into several files. What is in the format of the layer stays.
    """
    if layer.match is None:
        return
    sources: tuple[SourceBranch, ...] = layer.match.branches
    stand_ins = [f"{prefix}{source.weight}" for source in sources if source.weight is not None]
    for name in stand_ins:
        if name in state and tuple(state[name].shape) == STAND_IN:
            del state[name]
    if isinstance(layer, SWConv2d) or any(_is_ours(name) for name in state if name.startswith(f"{prefix}branches.")):
        return
    there = {name: values for name, values in state.items() if name.startswith(prefix)}
    read: dict[str, Any] = {}
    for i, (branch, source) in enumerate(zip(branches_of(layer), sources, strict=True)):
        place = f"{prefix}branches.{i}."
        if (name := f"{prefix}{source.weight}") in there:
            read |= _bank(branch, source, state.pop(name), place, name, errors)
        if source.bias is not None and (name := f"{prefix}{source.bias}") in there:
            read[f"{place}bias"] = state.pop(name)
        if source.bn is not None:
            own = f"{prefix}{source.bn}."
            read |= {f"{place}bn.{name[len(own) :]}": state.pop(name) for name in there if name.startswith(own)}
    for name, buffer in [] if layer.origin is None else layer.origin.buffers():
        if f"{prefix}{name}" in there:
            buffer.copy_(state.pop(f"{prefix}{name}"))
    if read:
        for i, branch in enumerate(branches_of(layer)):  # what the original has no name for stays as it is
            read.setdefault(f"{prefix}branches.{i}.placements", branch.rows)
            if branch.is_identity:
                read.setdefault(f"{prefix}branches.{i}.bank", branch.bank)
    state.update(read)


def _is_ours(name: str) -> bool:
    return name.endswith((".bank", ".placements"))


def _bank(
    branch: Branch, source: SourceBranch, kernel: Tensor, place: str, name: str, errors: list[str]
) -> dict[str, Tensor]:
    """The entries of a branch whose kernel this is; with extra edges, their gains as at the start."""
    expected = (branch.bank.shape[0], 1, *source.geometry.kernel_size)
    if tuple(kernel.shape) != expected:
        errors.append(
            f"size mismatch for {name}: copying a param with shape {kernel.shape} from checkpoint, "
            f"the shape of what the layer replaced is {torch.Size(expected)}."
        )
        return {f"{place}bank": branch.bank}  # or it would count as missing, too
    tiles, _ = lay_out(kernel.detach(), source.tile)
    entries = {f"{place}bank": tiles}
    if branch.gain is not None:
        gain = torch.zeros_like(branch.gain)
        gain[0] = 1
        entries[f"{place}gain"] = gain
    return entries
