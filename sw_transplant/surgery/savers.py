"""Who writes a model by the weights alone, and reads it into the class it knows: what is done so that this fails.

A state_dict has the names of Shiftwise layers. Read into a plain model with ``strict=True``, as is PyTorch's default,
that is an error. Some libraries read without: what is missing stays random, with no more than a warning. They are
recognised by the function that asks for the state_dict, for nothing else tells them from ``model.state_dict()``,
which shall stay what it is. Where they write whatever a model has, a tensor of one number is written along under the
name of every original kernel: no plain model takes it, a converted one passes it over. Where they write by a
description of the model, there must be one.
"""

from __future__ import annotations

import inspect
import sys
from types import CodeType
from typing import Any

import torch

from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.hosts import METHOD, import_rooms

STAND_IN = (1,)
"""Shape of what stands under an original kernel's name where the kernel has no dense form: no plain model takes it."""

_DESCRIBING = (("transformers.modeling_utils", "PreTrainedModel.save_pretrained"),)
_NOT_STRICT = (
    ("transformers.trainer", "Trainer._save"),
    ("huggingface_hub.hub_mixin", "ModelHubMixin.save_pretrained"),
    ("accelerate.accelerator", "Accelerator.save_model"),
)


def stand_in() -> torch.Tensor:
    """What stands under the name of a kernel; of one byte, so that it comes last in a file and moves nothing there."""
    return torch.zeros(STAND_IN, dtype=torch.uint8)


def watch_savers(layer: ShiftwiseConv2d) -> None:
    """Lets a layer see for whom its state_dict is made."""
    layer.register_state_dict_post_hook(_look_who_saves)


def _look_who_saves(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Completes a state_dict that will be read without being strict.

    Raises:
        RuntimeError: it will be written without a description of the layers, though there ought to be one.
    """
    describing, not_strict = _codes(_DESCRIBING), _codes(_NOT_STRICT)
    if not describing and not not_strict:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in describing:
            return _check_description(frame.f_locals.get("self"), prefix)
        if frame.f_code in not_strict:
            sources = () if layer.match is None else layer.match.branches
            state.update({f"{prefix}{source.weight}": stand_in() for source in sources if source.weight is not None})
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _check_description(model: Any, prefix: str) -> None:
    came_late = import_rooms()
    quantizer = getattr(model, "hf_quantizer", None)
    method = None if quantizer is None else quantizer.quantization_config.quant_method
    if method == METHOD and not came_late:
        return
    if quantizer is None and not came_late and "sw_transplant.hf" in sys.modules:
        return  # the class itself makes such layers
    raise RuntimeError(
        f"save_pretrained: {prefix.rstrip('.') or 'model'}: a converted layer in a {type(model).__name__} whose "
        f"configuration does not say so{'' if method is None else f' (it is quantized with {method})'}; "
        "from_pretrained would leave its kernel random. Call sw_transplant.hf.attach(model), then save it again"
    )


def _codes(functions: tuple[tuple[str, str], ...]) -> set[CodeType]:
    """The code of those functions whose modules are imported; nothing is imported for it."""
    codes = set()
    for module_name, path in functions:
        found: Any = sys.modules.get(module_name)
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            codes.add(inspect.unwrap(found).__code__)
    return codes
