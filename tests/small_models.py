"""Small models for the tests of finding and of surgery: convolutions, sums of branches, and one with everything."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(channels=4, size=7, **kwargs):
    kwargs = {"padding": size // 2, "groups": channels, **kwargs}
    return nn.Conv2d(channels, channels, size, **kwargs)


def conv_bn(channels=4, size=7, **kwargs):
    return nn.Sequential(conv(channels, size, bias=False, **kwargs), nn.BatchNorm2d(channels))


class Parallel(nn.Module):
    """A sum of branches, as in SLaK and RepLKNet."""

    def __init__(self, *branches):
        super().__init__()
        self.parts = nn.ModuleList(branches)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


class Residual(nn.Module):
    """A caller that does more than a sum of depthwise convolutions."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + torch.relu(self.inner(x))


class Functional(nn.Module):
    """Holds its kernel as a parameter, and calls F.conv2d."""

    def __init__(self, act=None, **settings):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 9, 9))
        self.offset = nn.Parameter(torch.randn(4))
        self.act = act or nn.Identity()
        self.settings = {"padding": 4, "groups": 4, **settings}

    def forward(self, x):
        return self.act(F.conv2d(x, self.kernel, self.offset, **self.settings))


class SelfPadding(nn.Conv2d):
    """Says padding 0 and pads to keep the size, as published large-kernel operators and timm's Conv2dSame do."""

    def forward(self, x):
        total = [
            max((-(-s // st) - 1) * st + k - s, 0)
            for s, st, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        return super().forward(x)


def model_of_everything():
    """Leaves, sums, shared layers, functional convolutions, frozen parts; float64, so that errors show."""
    torch.manual_seed(0)
    shared = conv()
    model = nn.Sequential(
        Residual(conv(bias=True)),
        Residual(Parallel(conv_bn(size=13), conv_bn(size=5), nn.BatchNorm2d(4))),
        Residual(shared),
        nn.BatchNorm2d(4),
        Residual(nn.Sequential(shared, nn.ReLU())),
        Functional(),
        SelfPadding(4, 4, 7, 2, groups=4),
        nn.Conv2d(4, 8, 8, padding="same", groups=4),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_var.uniform_(0.5, 2)
    return model
