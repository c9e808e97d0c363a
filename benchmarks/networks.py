"""The networks that the benchmarks run, with numbers that matter, and how right the outputs of a candidate are."""

from __future__ import annotations

import copy
import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import timm
import torch
from common import Peers, bound, relative_rms
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import sw_transplant.models  # noqa: F401  makes the networks known to timm
from sw_transplant import ShiftwiseConv2d, convert, merge

PUBLISHED = "shift"
"""The form of the paper's own operator."""
REFERENCE = "assembled"
"""The form that is right by nothing but PyTorch's own convolutions."""
TABLE7 = ".table7"
COUNTERPART = {"sw_tiny": "unireplknet_t", "sw_small": "unireplknet_s"}
"""What the paper's Table 7 compares its networks with."""
FOLDED = ("unireplknet", "replknet")
"""Whose authors fold BatchNorm and parallel kernels into one kernel for inference."""
GRADIENTS = 10
"""Gradients hold to the bounds of the outputs times this."""


def build_network(name: str, size: int, *, deploy: bool) -> nn.Module:
    """A network of timm or of this package, random and the same at every call; in eval mode, on the CPU, in float32.

    Args:
        name: what timm knows it by; with ``.table7``, as the ShiftwiseConv paper timed it: tiles of 5, and one path.
        size: of the images that it will get.
        deploy: in the form that its authors run inference in.
    """
    torch.manual_seed(0)
    known, timed, _ = name.partition(TABLE7)
    settings = {"kernel_size": (51, 49, 47, 13, 5), "N_path": 1} if timed else {}
    network = settle(timm.create_model(known, **settings), size)
    return merge(convert(network), inplace=True) if deploy and name.startswith(FOLDED) else network


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of ``(B, C, H, W)`` in terms of mean and variance, as SLaK's authors write it.

    It keeps contiguous maps contiguous, where `LayerNorm2d` gives channels_last. On a CPU, native convolutions are
    several times faster in one of the two than in the other.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


def with_channel_norms(network: nn.Module) -> nn.Module:
    """The network with a :class:`ChannelNorm` for every `LayerNorm2d`; changed in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, LayerNorm2d):
                setattr(module, name, ChannelNorm(child))
    return network


@torch.no_grad()
def settle(network: nn.Module, size: int) -> nn.Module:
    """Gives a fresh network numbers that matter, in place.

    As networks start, layer scales of 1e-6 hide what a layer computes. Here scales lie in 0.5 to 1.5, kernels and
    matrices keep the variance of their input, and every BatchNorm has the statistics of a batch of noise, so that
    float16 does not overflow.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif sum(side > 1 for side in parameter.shape) <= 1:  # one number per channel: a scale
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, math.sqrt(parameter.shape[0] / parameter.numel()))
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0  # keep nothing of what the statistics were
        network.train()(torch.randn(4, 3, size, size))
        for norm in norms:
            norm.momentum = 0.1
    return network.eval()


def with_form(network: nn.Module, form: str) -> nn.Module:
    """A copy whose Shiftwise modules run in this form."""
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if isinstance(module, ShiftwiseConv2d):
            module.form = form
    return twin


def is_shiftwise(network: nn.Module) -> bool:
    """Whether the network has Shiftwise modules of its own."""
    return any(isinstance(module, ShiftwiseConv2d) for module in network.modules())


def decisions(network: nn.Module) -> dict[str, str]:
    """Which form each Shiftwise module of a network ran in last, and why, by its path."""
    found = {}
    for path, module in network.named_modules():
        decision = getattr(module, "decision", None) if isinstance(module, ShiftwiseConv2d) else None
        if decision is not None:
            found[path] = f"{decision.form}: {decision.reason}"
    return found


def count_forms(network: nn.Module) -> dict[str, int]:
    """How many layers of a network ran in each form."""
    return dict(Counter(text.partition(":")[0] for text in decisions(network).values()))


def refuse_other_form(peers: Peers, candidate: str, module: nn.Module, form: str) -> None:
    """Takes a single layer out that ran in another form than was asked for: its time would be that of the other."""
    for text in decisions(module).values():
        if form != "auto" and not text.startswith(f"{form}:"):
            peers.fail(candidate, f"does not apply, it ran as {text}")


def load_peer(source: str) -> nn.Module:
    """The network that ``module:callable`` returns; modules in the current directory are found, too.

    Raises:
        ValueError: it is not of this form, or something else is returned.
    """
    module, colon, name = source.partition(":")
    if not (module and colon and name):
        raise ValueError(f"--peer {source}: expected module:callable, for instance my_package.my_module:build")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    network = getattr(importlib.import_module(module), name)()
    if not isinstance(network, nn.Module):
        raise ValueError(f"--peer {source}: it returned a {type(network).__name__}, expected a torch.nn.Module")
    return network


@dataclass
class Judge:
    """Compares outputs with those of the original in float64, and refuses what is wrong.

    Attributes:
        expected: the original's outputs in float64.
        factor: by how much the bounds are wider: ``GRADIENTS`` where gradients are among the outputs.
        errors: relative RMS error by candidate, the largest over the outputs.
    """

    expected: Sequence[Tensor]
    factor: float = 1
    errors: dict[str, float] = field(default_factory=dict)

    def check(self, peers: Peers, name: str, got: Sequence[Tensor], precision: str, native: str | None = None) -> None:
        """Takes a candidate out whose error is above the bound of its precision and above twice that of the native one.

        Args:
            peers: of which it is one.
            name: of the candidate.
            got: its outputs.
            precision: what it was computed in.
            native: a candidate that was checked before, whose rounding the network amplifies alike; the candidate
                itself if nothing is to be refused.
        """
        pairs = zip(got, self.expected, strict=True)
        errors = [relative_rms(one, other) for one, other in pairs]
        error = max(math.inf if math.isnan(error) else error for error in errors)
        self.errors[name] = error
        limit = max(self.factor * bound(precision), 2 * self.errors.get(native or "", 0.0))
        if error > limit and name != native:
            peers.fail(name, f"wrong: relative RMS error {error:.2g} against float64, expected at most {limit:.2g}")

    def worst(self, names: Sequence[str]) -> float | None:
        """The largest error among these candidates; None if none was checked."""
        return max((self.errors[name] for name in names if name in self.errors), default=None)
