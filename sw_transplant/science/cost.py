"""What a network costs as the papers count it: parameters and multiplications, with or without what is out of use.

Both papers call multiplications FLOPs; an addition is not counted. SW's are those of its small convolutions with the
parallel paths merged, which is form ``shift`` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sw_transplant.layers.parameters import copy_model
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.sparsity.masked_layers import MaskedLayer, masked_layers


@dataclass(frozen=True)
class Cost:
    """Numbers of one network.

    Attributes:
        parameters: all that it holds.
        multiplications: of one image.
        parameters_in_use, multiplications_in_use: the same without filters and weights that are out of use.
        size: height and width of the image.
    """

    parameters: int
    multiplications: int
    parameters_in_use: int
    multiplications_in_use: int
    size: tuple[int, int]


def count_cost(model: nn.Module, size: int | tuple[int, int] = 224, *, channels: int = 3) -> Cost:
    """Counts parameters and multiplications of a network.

    What is out of use is left out of the ``..._in_use`` numbers: a share of a layer's weights is that share of its
    multiplications. Parallel paths merge into one convolution, whose filter is in use where that of any path is.

    Args:
        model: any network of images; a copy of it on the meta device runs once, in eval mode.
        size: of the image, ``(H, W)`` or one number for both.
        channels: of the image.

    Returns:
        The counts.
    """
    from torch.utils.flop_counter import FlopCounterMode  # which takes long to import

    height, width = (size, size) if isinstance(size, int) else size
    idle, skipped = 0, {}
    for group in masked_layers(model, only_L=False):
        if all(layer.mask is None for layer in group):
            continue
        idle += sum(round(layer.weight.numel() * (1 - _density(layer))) for layer in group)
        path = group[0].path
        if len(group) > 1:  # the paths of one module, in a ModuleList of it
            path = path.rpartition(".")[0].rpartition(".")[0]
        skipped[path] = 1 - _in_any(group)
    twin = _as_counted(model)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.zeros(1, channels, height, width, device="meta"))
    total = counter.get_total_flops() // 2  # torch counts a multiplication and an addition
    saved = 0.0
    if skipped:
        flops = counter.get_flop_counts()
        prefix = type(twin).__name__
        for path, share in skipped.items():
            saved += sum(flops.get(f"{prefix}.{path}" if path else prefix, {}).values()) / 2 * share
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, total, parameters - idle, round(total - saved), (height, width))


def training_bytes(model: nn.Module, size: int | tuple[int, int] = 224, *, channels: int = 3, batch: int = 2) -> int:
    """What a forward pass in train mode keeps for the backward pass, in bytes for one image.

    Tensors that share memory count once; weights and buffers do not count. It is what autograd saves in the model's own
    dtype, without mixed precision, gradient checkpointing apart.

    Args:
        model: any network of images; a copy of it on the meta device runs once.
        size: of the image, ``(H, W)`` or one number for both.
        channels: of the image.
        batch: images at once; BatchNorms want two on maps of one pixel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    twin = copy_model(model).to("meta").train()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor  # held, so that no other tensor gets its place
        return tensor

    weights = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    dtype = next(twin.parameters()).dtype
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        twin(torch.zeros(batch, channels, height, width, device="meta", dtype=dtype))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // batch


def _density(layer: MaskedLayer) -> float:
    return 1.0 if layer.mask is None else layer.mask.float().mean().item()


def _in_any(group: Sequence[MaskedLayer]) -> float:
    """The share of units that any of the parallel paths uses."""
    masks = [layer.mask for layer in group]
    known = [mask for mask in masks if mask is not None]
    return 1.0 if len(known) < len(masks) else torch.stack(known).any(0).float().mean().item()


def _as_counted(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in eval mode: the paper's modules shift, other large kernels are what they are."""
    twin = copy_model(model).to("meta").eval()
    for layer in twin.modules():
        if isinstance(layer, SWConv2d):
            layer.form = "shift"
            layer.residual = False  # which form "shift" convolves with a filter of its own
        elif isinstance(layer, ShiftwiseConv2d) and layer.form != "shift":
            layer.form = "assembled"
    return twin
