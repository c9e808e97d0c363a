"""transformers' Trainer, with two habits that suit converted models."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from sw_transplant.hf.checkpoints import last_checkpoint
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.names import no_weight_decay, original_names


class ShiftwiseTrainer(Trainer):  # type: ignore[misc]
    """Decays what Trainer decays in the original, and resumes from a checkpoint that is whole.

    Trainer picks the parameters that weight decay leaves alone by their names and by the classes that hold them. A
    converted layer has other names, and gains of edges, which decay would close. With this class every parameter is
    treated as the one that it came from, and gains are left alone. ``train(resume_from_checkpoint=True)`` takes the
    last checkpoint that was written to its end (:func:`sw_transplant.hf.last_checkpoint`).

    Arguments are those of Trainer. To add these habits to another subclass: ``class Mine(ShiftwiseTrainer, Other)``.
    """

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that are decayed: as in the original, without gains."""
        decayed = set(super().get_decay_parameter_names(_original_tree(model)))
        names, alone = original_names(model), no_weight_decay(model)
        return [name for name, _ in model.named_parameters() if names.get(name, name) in decayed and name not in alone]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's.

        Raises:
            ValueError: ``resume_from_checkpoint`` is True, and no checkpoint was written to its end.
        """
        if resume_from_checkpoint is True:
            folder = self.args.output_dir or "."
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{folder}: no checkpoint in it was written to its end; leave resume_from_checkpoint out"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _original_tree(model: nn.Module) -> nn.Module:
    """The modules of the original, as far as they are known, with their names; on the meta device."""
    tensors = [*model.parameters(), *model.buffers()]
    tree = copy.deepcopy(model, {id(tensor): _empty(tensor) for tensor in tensors})
    for parent in list(tree.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, ShiftwiseConv2d) and child.origin is not None:
                parent._modules[name] = child.origin.site
    return tree


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
