"""From the source of a drawn network to the network: loaded, built, and given numbers that matter."""

from __future__ import annotations

import importlib.abc
import importlib.util
import itertools
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.nasty.networks import Network
from tests.nasty.source import source
from tests.nasty.state import seed_all


class _Loader(importlib.abc.InspectLoader):
    """Loads source that lies in memory, and shows it to whoever reads source (tracebacks, inspect, debuggers)."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.text, module.__file__ or "", "exec", dont_inherit=True), module.__dict__)


_COUNT = itertools.count()


def load(network: Network) -> ModuleType:
    """The network's file as a module, a new one at every call: what classes remember is not shared between two."""
    name = f"nasty_{network.seed}_{next(_COUNT)}"
    text = source(network)
    spec = importlib.util.spec_from_loader(name, _Loader(text), origin=f"<{name}>")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = f"<{name}>"
    sys.modules[name] = module  # pickle looks there
    exec(compile(text, module.__file__, "exec", dont_inherit=True), module.__dict__)
    return module


def build(module: ModuleType, network: Network) -> nn.Module:
    """The network with random numbers of a size that matters, the same at every call."""
    seed_all(network.seed)
    net: Any = module.Net().double()
    randomise(net)
    net = module.build(net)
    net.to(getattr(torch, network.world.dtype))
    if network.world.layout == "channels_last":
        net.to(memory_format=torch.channels_last)
    return net.train(network.world.training) if _same_mode(net) else net


def _same_mode(net: nn.Module) -> bool:
    """Whether no statement of a habit has set modes."""
    return all(module.training for module in net.modules())


@torch.no_grad()
def randomise(net: nn.Module) -> None:
    """Gives every parameter and BatchNorm statistic a value that matters, in place."""
    for name, parameter in net.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, (parameter.shape[0] / parameter.numel()) ** 0.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        else:
            parameter.uniform_(0.5, 1.5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
