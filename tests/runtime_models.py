"""Small layers, and a network of them, for the tests of what PyTorch does to models: compiling, casting, sending on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, merge
from sw_transplant.layers.sw_conv2d import SWConv2d

FORMS = ("auto", "shift", "assembled", "gemm", "toeplitz")
CHANNELS = 6
LAYERS = ("strips", "square", "paper")


class Strips(nn.Module):
    """What SLaK sums up: two strips and a small square, each with its BatchNorm."""

    def __init__(self, channels: int = CHANNELS, long: int = 13, short: int = 5, norm: bool = True) -> None:
        super().__init__()
        sizes = [(long, short), (short, long), (short, short)]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=(size[0] // 2, size[1] // 2), groups=channels, bias=False)
            for size in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) if norm else nn.Identity() for _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (norm(conv(x)) for conv, norm in zip(self.convs, self.norms, strict=True))
        return a + b + c


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Gives every BatchNorm, bias and gain numbers that matter, in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def original(name: str) -> nn.Module:
    """The plain module that a layer stands for, in eval mode and float32; the same numbers at every call."""
    torch.manual_seed(0)
    if name == "strips":
        return randomise(Strips()).eval()
    if name == "square":
        return nn.Conv2d(CHANNELS, CHANNELS, 7, stride=2, padding=3, groups=CHANNELS).eval()
    return merge(layer("paper"))


# Made once, and before a test counts or forbids what runs: finding them runs layers, too.
_CONVERTED = {name: convert(original(name)) for name in ("strips", "square")}


def layer(name: str, form: str = "auto", dtype: torch.dtype = torch.float32) -> ShiftwiseConv2d:
    """A layer ``(B, CHANNELS, H, W)`` in eval mode: strips with BatchNorm, a square of stride 2, or the paper's."""
    if name == "paper":
        torch.manual_seed(0)
        module = SWConv2d(CHANNELS, 11, ghost=0.34, edges=2)
        with torch.no_grad():
            for path in module.paths:
                path.weight.normal_(std=0.1)
        converted = randomise(module).eval()
    else:
        converted = copy.deepcopy(_CONVERTED[name])
    assert isinstance(converted, ShiftwiseConv2d)
    converted.form = form
    return converted.to(dtype)


def network(form: str = "auto", *, norm: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Images ``(B, 3, H, W)`` to 5 numbers, through two converted layers with ``norm`` also the paper's; eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1),
        Strips(norm=norm),
        nn.GELU(),
        nn.Conv2d(CHANNELS, CHANNELS, 7, stride=2, padding=3, groups=CHANNELS),
        nn.GELU(),
        copy.deepcopy(layer("paper")) if norm else nn.Identity(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 5),
    )
    model = convert(randomise(model).eval(), SWConfig(form=form))
    for module in model.modules():
        if isinstance(module, ShiftwiseConv2d):
            module.form = form
    return model.to(dtype)


def images(batch: int, channels: int = 3, size: tuple[int, int] = (12, 10)) -> Tensor:
    """Seeded normal noise."""
    generator = torch.Generator().manual_seed(batch + size[0])
    return torch.randn(batch, channels, *size, generator=generator)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative RMS error; infinite where anything is not finite."""
    value = float((got.detach().double() - expected.double()).norm() / expected.detach().double().norm())
    return value if value == value else float("inf")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the parameters by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def joined(tensors: dict[str, Tensor]) -> Tensor:
    """All numbers in one row, for one error of them all: some gradients are zero but for rounding."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
