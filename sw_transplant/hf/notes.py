"""What the configuration of a model says of its Shiftwise layers, and what in it keeps plain loaders away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sw_transplant.hf.shiftwise_config import ShiftwiseConfig, Weights
from sw_transplant.layers.shiftwise_conv2d import STRANGE, ShiftwiseConv2d
from sw_transplant.surgery.description import LayerDescription, describe
from sw_transplant.surgery.origin import is_stored_dense

NEEDED = "sw_transplant (pip install sw-transplant, then import sw_transplant.hf before from_pretrained)"
"""The fusion that ``config.json`` asks for where no plain model can hold the weights."""


def shiftwise_layers(model: nn.Module) -> Iterator[tuple[str, ShiftwiseConv2d]]:
    """The Shiftwise layers of a model with their paths."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, ShiftwiseConv2d))


def strange_modules(model: nn.Module) -> list[str]:
    """Paths of what was merged or reparameterized into weights that the class of the model has no place for."""
    return [path for path, module in model.named_modules() if any(map(_is_strange, _with_origin(module)))]


def _with_origin(module: nn.Module) -> Iterator[nn.Module]:
    """A module and, where it is a layer, what it took the place of: that may have been merged before."""
    yield module
    if isinstance(module, ShiftwiseConv2d) and module.origin is not None:
        yield from module.origin.site.modules()


def _is_strange(module: nn.Module) -> bool:
    return bool(vars(module).get(STRANGE))


def note_layers(model: PreTrainedModel) -> None:
    """Describes the layers of a model in its configuration; takes the description away where there are none.

    Raises:
        ValueError: a layer that cannot be described; nothing is described then.
    """
    for part in model.modules():  # what a part was saved with on its own does not belong into the whole
        if isinstance(part, PreTrainedModel) and part.config is not model.config:
            forget_layers(part)
    forget_layers(model)
    layers = [module for _, module in shiftwise_layers(model)]
    if layers:
        weights: Weights = "dense" if all(map(is_stored_dense, layers)) else "banks"
        model.config.quantization_config = ShiftwiseConfig(layers=describe(model), weights=weights)


def forget_layers(model: PreTrainedModel) -> None:
    """Takes what this package has written out of a model's configuration."""
    if isinstance(getattr(model.config, "quantization_config", None), ShiftwiseConfig):
        del model.config.quantization_config
    forget_needs(model.config)


def forget_needs(config: Any) -> Any:
    """Takes what keeps plain loaders away out of a configuration, and returns it."""
    fusions = dict(getattr(config, "fusion_config", None) or {})
    if fusions.pop(NEEDED, None) is not None:
        if fusions:
            config.fusion_config = fusions
        else:
            del config.fusion_config
    return config


def kernel_names(layers: Sequence[LayerDescription]) -> Iterator[str]:
    """The names that the kernels of these layers have in the original."""
    for layer in layers:
        for source in layer.match.branches:
            if source.weight is not None:
                yield f"{layer.match.path}.{source.weight}"
