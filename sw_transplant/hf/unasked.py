"""Models of transformers that nobody converted, with parts in them that somebody did.

``model.backbone = sw_transplant.convert(model.backbone)``: the part does not know the whole, and nobody told the whole.
transformers asks a model for its ``hf_quantizer`` before it writes it. A model that was given one has it among its own
attributes; one that was not finds what is here, at its class.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from sw_transplant.hf.notes import shiftwise_layers, strange_modules
from sw_transplant.hf.quantizer import ShiftwiseQuantizer
from sw_transplant.hf.shiftwise_config import ShiftwiseConfig


def given_quantizer(model: PreTrainedModel) -> ShiftwiseQuantizer | None:
    """The quantizer of this package that a model was given; None where there is another one, or none."""
    quantizer = vars(model).get("hf_quantizer")
    return quantizer if isinstance(quantizer, ShiftwiseQuantizer) else None


class _Unasked:
    """The attribute ``hf_quantizer`` of models that were not given one."""

    def __init__(self) -> None:
        self._made_by_class: WeakKeyDictionary[nn.Module, tuple[frozenset[str], bool]] = WeakKeyDictionary()

    def __get__(self, model: PreTrainedModel | None, _: Any = None) -> ShiftwiseQuantizer:
        if model is not None:
            replaced = {path for path, layer in shiftwise_layers(model) if layer.match is not None}
            if strange_modules(model) or (replaced and not self._makes(model, frozenset(replaced))):
                return ShiftwiseQuantizer(ShiftwiseConfig(layers=[]))
        raise AttributeError("hf_quantizer")  # as if it were not here

    def _makes(self, model: PreTrainedModel, layers: frozenset[str]) -> bool:
        """Whether the class of the model converts by itself, so that whoever reads its weights has the same layers."""
        known = self._made_by_class.get(model)
        if known is None or known[0] != layers:
            known = self._made_by_class[model] = layers, layers <= _made_by_class(model)
        return known[1]


def _made_by_class(model: PreTrainedModel) -> set[str]:
    """Paths of the Shiftwise layers that ``from_pretrained`` finds in a new model of the class."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            new = type(model)(copy.deepcopy(model.config))
    except Exception:  # a foreign class may fail in any way; then it is saved like the others
        return set()
    return {path for path, _ in shiftwise_layers(new)}


PreTrainedModel.hf_quantizer = _Unasked()  # type: ignore[attr-defined]
