"""Reading official weight files: strictly, and without running code that is stored in them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from sw_transplant.layers.zeros import mask_zeros, masks_for, put_masks
from sw_transplant.models.unpickling import read_weights

__all__ = ["load_checkpoint"]

Prefer = Literal["model", "ema"]
# Where training code keeps the weights inside its checkpoint, in order of preference.
WRAPPINGS = ("model", "state_dict", "module", "model_ema")
AVERAGES = ("model_ema", "state_dict_ema")
# What DistributedDataParallel and torch.compile put in front of names, in any order and number.
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
BACKBONE = "backbone."
SHOWN = 3


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    prefer: Prefer = "model",
    masks: Literal["from_weights"] | None = None,
    only_L: bool = True,
) -> None:
    """Load an official checkpoint into `model`, in place; every tensor of the model must be in it, and nothing else.

    A ``.safetensors`` file is read as such, any other without running code that is stored in it: beside tensors,
    numbers and containers it may hold what training programs put beside them, NumPy's numbers and the arguments as an
    ``argparse.Namespace``; everything else is refused by name. The weights may lie under 'model', 'state_dict',
    'module' or 'model_ema', the first of these that holds tensors, or at the top. Prefixes 'module.' and '_orig_mod.'
    are ignored, in the file and in the model. Values are cast to the model's dtype and device.

    Masks of :class:`sw_transplant.sparsity.FilterSparsity` may be in the file: the model's layers then have them.

    Of the file of a whole detector or segmenter, what lies under 'backbone.' is read, and nothing else. Build that
    backbone with ``features_only=True, stage_norms=True``.

    Args:
        model: the network, for instance ``timm.create_model('slak_tiny')``, or timm's feature wrapper around it.
        path: the file.
        prefer: ``"model"``, or ``"ema"`` for the averaged weights under 'model_ema', which have to be there.
        masks: ``"from_weights"``: what is zero in the file is out of use in the model; official sparse weights hold
            zeros and no masks. See :meth:`sw_transplant.sparsity.FilterSparsity.from_weights`.
        only_L: of these masks: filters of large kernels only. False: also single weights of all other layers, as in
            SLaK's.

    Raises:
        ValueError: if the file is missing or cannot be read safely, if it holds no weights of this model, or if a
            tensor is missing, unexpected or of another shape. The model is then as it was. Or if nothing is zero that
            masks could come from; then the weights are loaded.
    """
    path = Path(path)
    if prefer not in get_args(Prefer):
        raise ValueError(f"load_checkpoint: prefer {prefer!r}, expected one of {get_args(Prefer)}")
    if masks not in (None, "from_weights"):
        raise ValueError(f"load_checkpoint: masks {masks!r}, expected None or 'from_weights'")
    weights = _without_prefixes(_unwrap(read_weights(path), path, prefer), path)
    if isinstance(model, FeatureGetterNet):
        model = model.model
    own = {PREFIXES.sub("", name): name for name in model.state_dict()}
    weights = _of_backbone(weights, own)
    layers = {PREFIXES.sub("", name): module for name, module in model.named_modules(remove_duplicate=False)}
    known = masks_for(layers, weights)
    given, weights = weights, {name: tensor for name, tensor in weights.items() if name not in known}
    _check(model, own, weights, path)
    model.load_state_dict({own[name]: tensor for name, tensor in weights.items()})
    put_masks(known, given)
    if masks is not None and not mask_zeros(model, only_L=only_L)[0]:
        raise ValueError(
            f"{path}: no {'filter of a large kernel' if only_L else 'weight'} is zero, expected sparse weights; leave "
            f"masks out{', or try only_L=False' if only_L else ''}"
        )


def _unwrap(content: Any, path: Path, prefer: Prefer) -> Mapping[str, Any]:
    """The weights inside what the file holds."""
    if prefer == "ema":
        averages = [content.get(name) for name in AVERAGES] if isinstance(content, Mapping) else []
        for weights in averages:
            if isinstance(weights, Mapping) and any(isinstance(entry, torch.Tensor) for entry in weights.values()):
                return weights
        raise ValueError(f"{path}: holds no averaged weights under {AVERAGES}; expected them with prefer='ema'")
    if isinstance(content, Mapping):
        for weights in (*(content.get(name) for name in WRAPPINGS), content):
            if isinstance(weights, Mapping) and any(isinstance(entry, torch.Tensor) for entry in weights.values()):
                return weights
    found = f"the entries {list(content)[:SHOWN]}" if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"{path}: holds no weights, only {found} (expected a state_dict, or one under {WRAPPINGS})")


def _without_prefixes(weights: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    bare: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: entry {name!r} is of type {type(tensor).__name__}, expected a tensor")
        short = PREFIXES.sub("", name)
        if short in bare:
            raise ValueError(f"{path}: {short!r} comes twice, with and without the prefix of a wrapper")
        bare[short] = tensor
    return bare


def _of_backbone(weights: dict[str, torch.Tensor], own: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The part of a detector that the model can be, where the whole is none."""
    part = {name.removeprefix(BACKBONE): tensor for name, tensor in weights.items() if name.startswith(BACKBONE)}
    return part if part and not any(name in own for name in weights) else weights


def _check(model: nn.Module, own: Mapping[str, str], weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise one ValueError that names what does not fit."""
    state = model.state_dict()
    where = f"{path} does not fit {type(model).__name__}"
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(f"{where}: the model is on the meta device; give it memory first: model.to_empty(device=...)")
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    if len(missing) == len(own):
        raise ValueError(
            f"{where}: none of its {len(weights)} tensors is one of the model's "
            f"(it has {_some(unexpected)}; the model has {_some(missing)})"
        )
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(state[full].shape)}"
        for name, full in own.items()
        if name in weights and weights[name].shape != state[full].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(wrong.values()):
        faults = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{where}: {faults}. Build the model with the settings the file was made with")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
