"""What transformers calls when it loads, saves and trains a model with Shiftwise layers.

The folder of a converted model is dense where that says everything: the original's kernels under their own names, and
in ``config.json`` what to make of them. Who has this package gets the converted model, bit for bit; who has not gets
the plain one, and a warning. What has no dense form (mode ``"shiftwise"``, extra edges, masks) is written as it is.
Loaded as a plain model it would have random kernels, so two things keep plain loaders away from it. ``config.json``
asks for a "fusion" (what transformers calls a runtime feature that a model is loaded with) of which only this package
knows: ``from_pretrained`` raises an error that names it. And under the name of every original kernel stands a tensor
of another shape, which ``load_state_dict`` refuses even where it is not strict, as when Trainer resumes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from sw_transplant.find.match import Match
from sw_transplant.hf.notes import NEEDED, forget_needs, kernel_names, note_layers, shiftwise_layers, strange_modules
from sw_transplant.hf.shiftwise_config import ShiftwiseConfig
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.convert import convert, put
from sw_transplant.surgery.description import LayerDescription, rebuild
from sw_transplant.surgery.hosts import METHOD
from sw_transplant.surgery.merge import merge
from sw_transplant.surgery.restore import dense_state_dict
from sw_transplant.surgery.savers import stand_in

logger = logging.get_logger(__name__)


@register_quantizer(METHOD)
class ShiftwiseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Rebuilds Shiftwise layers in ``from_pretrained``, writes them in ``save_pretrained``; nothing is quantized."""

    quantization_config: Any  # a ShiftwiseConfig, which transformers declares less narrowly
    is_trainable = True
    is_qat_trainable = True  # else Trainer wants adapters beside it
    is_compileable = True

    def is_serializable(self, **_: Any) -> bool:
        return True

    # ---- loading ----

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses weights that are not in memory.

        Raises:
            ValueError: the device map offloads layers to disk or, beside an accelerator, to the CPU.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(
                f"device_map: {sorted(devices)} offloads layers, which Shiftwise layers do not support; "
                "expected devices that hold their weights all the time"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Takes away what keeps plain loaders from the weights: transformers calls this before it looks at them."""
        return forget_needs(config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        settings: ShiftwiseConfig = self.quantization_config
        if self.pre_quantized and settings.weights == "banks":
            put(model, [(layer.match, _on_meta(model, layer)) for layer in self._places(model)])
            ours = {_stand_in_pattern(model, name) for name in kernel_names(settings.layers or [])}
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ours}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        settings: ShiftwiseConfig = self.quantization_config
        if not self.pre_quantized:
            convert(model, settings.config, select=settings.select, inplace=True)
        elif settings.weights == "dense":
            put(model, [(layer.match, _on_site(model, layer)) for layer in self._places(model)])
        else:
            for path, module in shiftwise_layers(model):
                _check_loaded(path, module)
                module.rederive()
        # For transformers "quantized" means that dtypes are fixed and that Trainer needs adapters: neither holds.
        model.__dict__["is_quantized"] = False
        del model.quantization_method
        note_layers(model)
        return model

    def _places(self, model: PreTrainedModel) -> Iterator[LayerDescription]:
        """The layers of the configuration where this model has them: with its base model's prefix, or without.

        Raises:
            ValueError: weights that only a Shiftwise layer can hold, and no such place.
        """
        settings: ShiftwiseConfig = self.quantization_config
        for layer in settings.layers or []:
            path = _find_place(model, layer.match.path)
            if path is not None:
                aliases = (_find_place(model, alias) for alias in layer.match.aliases)
                places = tuple(alias for alias in aliases if alias is not None)
                yield layer._replace(match=_moved(layer.match, path, places))
            elif settings.weights == "banks":
                raise ValueError(f"{type(model).__name__} has no layer {layer.match.path}; is it another model?")
            else:  # a head that this class does not have, for instance; its weights are not loaded either
                logger.warning(f"{type(model).__name__} has no layer {layer.match.path}: it is not converted")

    # ---- saving ----

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes. Brings the configuration up to date, which it writes next.

        Raises:
            ValueError: a layer that cannot be rebuilt from the model's class: reparameterized, built by hand, or
                merged into something that the class does not have.
            NotImplementedError: weights that are not in this process.
        """
        if strange := strange_modules(model):
            raise ValueError(
                f"save_pretrained: {', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}: merged "
                f"into convolutions with other names or shapes than those of {type(model).__name__}, which "
                "from_pretrained would leave random; save the converted model instead, or the state_dict of this one"
            )
        note_layers(model)
        settings = getattr(model.config, "quantization_config", None)
        if not isinstance(settings, ShiftwiseConfig) or settings.layers is None:
            return None, {}
        for path, module in shiftwise_layers(model):
            if not all(map(_is_whole, module.parameters())):
                raise NotImplementedError(
                    f"save_pretrained: {path}: its weights are not whole in this process (offloaded, or sharded by "
                    "FSDP or DeepSpeed); expected all of them. With Trainer and FSDP choose the state dict type "
                    "SHARDED_STATE_DICT; elsewhere gather them (torch.distributed.checkpoint.state_dict."
                    "get_model_state_dict, or zero_to_fp32.py of DeepSpeed), load them into a converted model in one "
                    "process, and save that"
                )
        if settings.weights == "dense":
            return dense_state_dict(model), {}
        model.config.fusion_config = {**(getattr(model.config, "fusion_config", None) or {}), NEEDED: True}
        return {**model.state_dict(), **{name: stand_in() for name in kernel_names(settings.layers)}}, {}

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """``model.dequantize()``: :func:`sw_transplant.merge`, in place; ``dtype`` None keeps that of the model."""
        merge(model, inplace=True)
        return model if dtype is None else model.to(dtype)


def _is_whole(parameter: Tensor) -> bool:
    """Whether this process holds all of a parameter: not offloaded, and in no part of FSDP's or DeepSpeed's."""
    return not (parameter.is_meta or type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id"))


def _find_place(model: PreTrainedModel, path: str) -> str | None:
    """A path of a saved model in this one, which may be its base model or have it inside; None for no such place."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), f"{prefix}{path}"):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _moved(match: Match, path: str, aliases: tuple[str, ...]) -> Match:
    return Match.from_dict({**match.to_dict(), "path": path, "aliases": aliases})


def _on_meta(model: PreTrainedModel, layer: LayerDescription) -> ShiftwiseConv2d:
    """The module of a layer, on the meta device, for a model that is there itself."""
    with torch.device("cpu"):  # its placements are numbers, from which others follow
        site = copy.deepcopy(model.get_submodule(layer.match.path)).to_empty(device="cpu")
        return rebuild(site, layer).to("meta")


def _on_site(model: PreTrainedModel, layer: LayerDescription) -> ShiftwiseConv2d:
    """The module of a layer, with the weights that the model has in its place."""
    site = model.get_submodule(layer.match.path)
    hook = getattr(site, "_hf_hook", None)
    if hook is None:
        return rebuild(site, layer)
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module  # type: ignore[import-untyped]

    module = rebuild(remove_hook_from_module(site), layer)  # from where a device map put the layer itself
    return add_hook_to_module(module, hook)  # type: ignore[no-any-return]


def _check_loaded(path: str, module: ShiftwiseConv2d) -> None:
    """transformers marks what it has read; the rest is memory as it was found.

    Raises:
        ValueError: a tensor was not in the file.
    """
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    missing = [name for name in module.state_dict() if not getattr(held[name], "_is_hf_initialized", False)]
    if missing:
        raise ValueError(
            f"{path}: {', '.join(missing[:3])}: not in the file with the weights, though config.json says that it "
            "holds Shiftwise layers. Was it written by a plain model with the configuration of a converted one?"
        )


def _stand_in_pattern(model: PreTrainedModel, name: str) -> str:
    """For the report of what was not loaded: this name, with the base model's prefix or without."""
    return rf"(^|\.){re.escape(name.removeprefix(f'{model.base_model_prefix}.'))}$"
