"""BatchNorm statistics of the branches, from the calibration images, and the affine part that keeps eval as it is.

The module's BatchNorms start as the identity. In train mode they would normalise the branches by what the batch has,
and the network would start from another function than in eval. With the running statistics of real responses, scale and
bias say in both modes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.layers.orders import BRANCHES, Orders
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.calibration.assembly import Assembly
from sw_transplant.surgery.calibration.images import Images, read_images
from sw_transplant.surgery.calibration.moments import Moments, Taps
from sw_transplant.surgery.calibration.responses import run_pairs, visits
from sw_transplant.surgery.calibration.sums import Sums


@torch.no_grad()
def write_norms(module: SWConv2d, parts: Tensor, moments: Moments, scales: Tensor, bias: Tensor) -> None:
    """Sets the BatchNorms of a module.

    Args:
        module: changed in place.
        parts: float64 ``(active, 3, P)``, the taps of each branch before its BatchNorm.
        moments: of the active channels' input, over all taps.
        scales: ``(active, 3)``, what each branch is to be multiplied with in eval.
        bias: ``(active,)``, what is to be added.
    """
    mean, variance = response_statistics(parts, moments)
    for i, branch in enumerate(BRANCHES):
        bn: Any = module.norm(branch)
        bn.running_mean.copy_(mean[:, i])
        bn.running_var.copy_(variance[:, i])
        deviation = (bn.running_var.to(scales) + bn.eps).sqrt()  # as it was stored, so that eval stays the same
        bn.weight.copy_(scales[:, i] * deviation)
        bn.bias.copy_(scales[:, i] * mean[:, i] + (bias if branch == "identity" else 0))
    module.clear_cache()


def response_statistics(parts: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(C, 3)`` of the branches' responses over images and positions."""
    mean = (parts * moments.sums[:, None]).sum(2) / moments.positions
    square = ((parts @ moments.gram) * parts).sum(2) / moments.positions
    return mean, (square - mean.square()).clamp(min=0)


def set_statistics(model: nn.Module, images: Any, *, batch_size: int = 16, keep_eval: bool = True) -> None:
    """Sets the BatchNorm statistics of all modules of mode ``"shiftwise"`` from images; in eval nothing changes.

    :func:`convert` does so itself where it is given images. This is for models that were converted without.

    Args:
        model: a converted model, changed in place.
        images: as ``calibration`` of :func:`convert`.
        batch_size: of a single tensor.
        keep_eval: change scale and bias along, so that eval gives what it gave. False leaves them alone: then eval
            gives what train mode gave.

    Raises:
        ValueError: there is no such module, or the images are not what they should be.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, SWConv2d)}
    if not layers:
        raise ValueError(f"set_statistics: {type(model).__name__} has no module of mode 'shiftwise'; convert it first")
    read = images if isinstance(images, Images) else read_images(images, batch_size)
    met = visits(model, read, layers)
    if missing := sorted(layers.keys() - met.keys()):
        raise ValueError(f"set_statistics: the images do not reach {missing}; give some that do")
    found = [(layers[path], _sums_of(model, path, layers[path], read)) for path in met]
    for module, moments in found:
        _write(module, moments, keep_eval)


def _sums_of(model: nn.Module, path: str, module: SWConv2d, images: Images) -> Moments:
    active = module._table("active")
    sums = Sums(path, module.length, module.tile, module.stride)

    def use(_: Any, seen: dict[str, list[Tensor]]) -> None:
        for x, y in zip(seen["x"], seen["y"], strict=True):
            sums.add(x.index_select(1, active.to(x.device)), torch.zeros_like(y[:, : len(active)]))

    run_pairs(None, model, images, {}, {"x": (module, "input"), "y": (module, "output")}, use)
    return sums.moments()


def _write(module: SWConv2d, moments: Moments, keep_eval: bool) -> None:
    orders = Orders(*(module._table(name).to(moments.gram.device) for name in BRANCHES))
    taps = Taps(module.length, module.tile, (1, 1), (1, 1), (1, 1))
    bank = module.bank.detach().to(moments.gram)
    if module.gain is not None:
        raise ValueError("set_statistics: a module with gains is not supported; set them after this")
    parts = Assembly(orders, taps).parts(bank.flatten(1))
    norms: list[Any] = [module.norm(branch) for branch in BRANCHES]
    scales = torch.stack([bn.weight.to(bank) / (bn.running_var.to(bank) + bn.eps).sqrt() for bn in norms], 1)
    if not keep_eval:
        mean, variance = response_statistics(parts, moments)
        for i, bn in enumerate(norms):
            bn.running_mean.copy_(mean[:, i])
            bn.running_var.copy_(variance[:, i])
        module.clear_cache()
        return
    means = torch.stack([bn.running_mean.to(bank) for bn in norms], 1)
    bias = sum(bn.bias.to(bank) for bn in norms) - (scales * means).sum(1)
    write_norms(module, parts, moments, scales, bias)
