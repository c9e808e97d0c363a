"""Distillation: a converted model learns from the original, on the images at hand, without labels.

Calibration (:mod:`sw_transplant.surgery.calibration`) fits one layer after the other; training fits all of them
together. The original tells what to aim at: its logits, and the outputs of the blocks whose layers were replaced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sw_transplant.batches import describe, is_images
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.calibration.progress import progress_bar
from sw_transplant.surgery.calibration.responses import logits_of
from sw_transplant.surgery.names import no_weight_decay

__all__ = ["Distiller", "distill"]


class Distiller:
    """The loss of a student against its teacher: a criterion for any training loop.

    While it is attached, it keeps the arguments of the student's last call; the loss runs the teacher on them. It is

        temperature**2 * KL(teacher's classes || student's)
        + feature_weight * mean over blocks of |student's output - teacher's|**2 / |teacher's|**2
        + label_weight * cross-entropy with the labels, where labels are given

    In a loop of one's own ``distiller(student(x)).backward()``, or ``distiller(student(x), labels)``; in timm's, as
    ``loss_fn``; for Hugging Face's ``Trainer(..., compute_loss_func=distiller)``.

    Args:
        student: a converted model.
        teacher: the model that it was converted from; it is set to eval mode for its calls and gets no gradients.
        temperature: softens both distributions.
        feature_weight: of the outputs of the blocks; 0 for the logits alone.
        label_weight: of the labels, where there are any.

    Raises:
        ValueError: the student has no converted layer, or is the teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 1.0,
        feature_weight: float = 1.0,
        label_weight: float = 0.0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"Distiller: temperature {temperature}, expected a number above 0")
        self.student, self.teacher = student, teacher
        self.temperature, self.feature_weight, self.label_weight = temperature, feature_weight, label_weight
        self.blocks = _replaced_blocks(student, teacher)
        if student is teacher:
            raise ValueError("Distiller: student and teacher are one model; give the original, converted with a copy")
        self._mine: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._call: tuple[Any, Any] | None = None
        self._hooks: list[Any] = [student.register_forward_pre_hook(self._keep_call, with_kwargs=True)]
        if feature_weight:
            for path in self.blocks:
                for model, into in ((student, self._mine), (teacher, self._theirs)):
                    self._hooks.append(model.get_submodule(path).register_forward_hook(_note(path, into)))

    def detach(self) -> None:
        """Takes the hooks off both models."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._call = None

    def __call__(self, output: Any, labels: Any = None, *_: Any, **__: Any) -> Tensor:
        """The loss of the student's last output.

        Args:
            output: what the student gave: logits ``(B, classes)``, or an object or dict that has ``logits``.
            labels: int64 ``(B,)``; None where there are none. Also a dict of transformers with ``labels``.

        Raises:
            ValueError: the student was not called before, or has no logits and no blocks to compare.
        """
        if self._call is None:
            raise ValueError("Distiller: the student was not called since the last loss; call it, then its loss")
        target = self._ask_teacher(*self._call)
        terms = [self.feature_weight * self._feature_loss()] if self.feature_weight and self._theirs else []
        mine, theirs = _logits(output), _logits(target)
        if mine is not None and theirs is not None:
            t = self.temperature
            mine, theirs = mine.float() / t, theirs.float() / t
            kl = F.kl_div(mine.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean")
            terms.append(t * t * kl)
            if isinstance(labels, Mapping):
                labels = labels.get("labels")
            if self.label_weight and isinstance(labels, Tensor):
                terms.append(self.label_weight * F.cross_entropy(mine * t, labels))
        if not terms:
            raise ValueError(
                f"Distiller: {type(output).__name__} has no logits (B, classes), and no block gives a tensor to "
                "compare; expected a classifier, or feature_weight above 0"
            )
        self._mine.clear()
        self._theirs.clear()
        self._call = None
        return torch.stack(terms).sum()

    def _feature_loss(self) -> Tensor:
        losses = []
        for path, theirs in self._theirs.items():
            mine = self._mine[path].float()
            losses.append((mine - theirs.float()).square().mean() / theirs.float().square().mean().clamp(min=1e-12))
        return torch.stack(losses).mean()

    def _keep_call(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._call = torch.utils._pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))

    def _ask_teacher(self, args: Any, kwargs: Any) -> Any:
        flags = [(module, module.training) for module in self.teacher.modules()]
        try:
            with torch.no_grad():
                return self.teacher.eval()(*args, **kwargs)
        finally:
            for module, training in flags:
                module.training = training


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    *,
    epochs: int = 10,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.0,
    batch_size: int = 32,
    temperature: float = 1.0,
    feature_weight: float = 1.0,
    label_weight: float = 0.0,
    batch_statistics: bool = True,
    augment: Callable[[Tensor], Tensor] | None = None,
    attach: Sequence[Any] = (),
    seed: int = 0,
    after_epoch: Callable[[int, float], None] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Trains a converted model to answer as its original does: AdamW, cosine schedule, no labels needed.

    Args:
        student: from ``convert(teacher, ...)``; trained in place. It ends in the mode that it was in.
        teacher: the original.
        data: images ``(N, C, H, W)``, a pair of them and labels ``(N,)``, or an iterable that can be gone through again
            of batches: tensors, pairs (images, labels), or dicts of the forward's arguments.
        epochs, learning_rate, weight_decay: of the training; the rate falls to 0 as half a cosine.
        batch_size: of tensors.
        temperature, feature_weight, label_weight: as in :class:`Distiller`.
        batch_statistics: whether BatchNorms go by each batch, as in any training. False keeps the statistics that they
            have, which are good after a calibration: then the training starts from the function that it left.
        augment: makes another batch of a batch of images; teacher and student see the same.
        attach: what follows the optimizer, with ``attach(optimizer)`` and ``detach()``:
            :class:`sw_transplant.sparsity.FilterSparsity` for instance, initialised before.
        seed: of the order of the images; the global generators are seeded for the training and then as they were.
        after_epoch: is told the number of the epoch, from 1, and its mean loss; may leave the student in any mode.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        The student.

    Raises:
        ValueError: no data, batches of another form, no converted layer, nothing that trains, or a loss that is not
            finite.
    """
    if epochs < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"distill: epochs {epochs}, batch_size {batch_size}, learning_rate {learning_rate}; expected at least 1, "
            "at least 1, and a number above 0"
        )
    like = next(student.parameters())
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError("distill: no parameter of the student requires gradients; student.requires_grad_() first")
    steps = sum(1 for _ in _batches(data, batch_size, 0))
    if not steps:
        raise ValueError("distill: data is empty; expected images, or batches that can be gone through again")
    optimizer = torch.optim.AdamW(_groups(student, weight_decay), learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: (1 + math.cos(math.pi * n / (steps * epochs))) / 2
    )
    settings = {"temperature": temperature, "feature_weight": feature_weight, "label_weight": label_weight}
    distiller = Distiller(student, teacher, **settings)
    modes = [(module, module.training) for module in student.modules()]
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        bar_of = progress_bar(progress, epochs, "distilling")
        with torch.enable_grad(), torch.random.fork_rng(devices=devices), bar_of as bar:
            torch.manual_seed(seed)
            for follower in attach:
                follower.attach(optimizer)
            for epoch in range(1, epochs + 1):
                bar(f"epoch {epoch}")
                _train(student, batch_statistics)
                total = 0.0
                for batch in _batches(data, batch_size, seed + epoch):
                    images, labels, others = _read(batch, like)
                    if augment is not None and images is not None:
                        images = augment(images)
                    output = student(**others) if images is None else student(images, **others)
                    loss = distiller(output, labels)
                    if not bool(torch.isfinite(loss)):
                        raise ValueError(
                            f"distill: the loss of epoch {epoch} is {float(loss.detach())}, expected a finite one; "
                            "give finite images, or a lower learning_rate"
                        )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += float(loss.detach())
                if after_epoch is not None:
                    after_epoch(epoch, total / steps)
    finally:
        distiller.detach()
        for follower in attach:
            follower.detach()
        for module, training in modes:
            module.training = training
        for module in student.modules():
            if isinstance(module, ShiftwiseConv2d):
                module.clear_cache()
    return student


def _train(student: nn.Module, batch_statistics: bool) -> None:
    """Train mode, but for BatchNorms that keep their statistics."""
    student.train()
    if not batch_statistics:
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _replaced_blocks(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The blocks around converted layers that both models have and whose layers run for them; else the layers."""
    layers = [path for path, module in student.named_modules() if isinstance(module, ShiftwiseConv2d)]
    if not layers:
        raise ValueError(f"Distiller: {type(student).__name__} has no converted layer; expected a model from convert()")
    theirs = dict(teacher.named_modules())
    blocks: dict[str, None] = {}
    for path in layers:
        block = path.rpartition(".")[0]
        plain = not block or isinstance(student.get_submodule(block), (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        name = path if plain else block
        if name and name in theirs:
            blocks[name] = None
    return list(blocks)


def _note(path: str, into: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, tuple) and output:
            output = output[0]
        if isinstance(output, Tensor) and output.is_floating_point():
            into[path] = output

    return hook


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    return logits_of(output)


def _groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    alone = no_weight_decay(student)
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.dim() < 2 or name in alone]
    decayed = [p for name, p in named if not (p.dim() < 2 or name in alone)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _batches(data: Any, batch_size: int, seed: int) -> Iterator[Any]:
    """Batches in the order of a seed, where tensors came; else as they come."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    if isinstance(data, Tensor) or (pair and data[1].dim() == 1):
        images, labels = (data, None) if isinstance(data, Tensor) else data
        order = list(range(len(images)))
        random.Random(seed).shuffle(order)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if len(chosen) > 1 or len(order) == 1:  # a BatchNorm on a map of one position needs two
                yield images[chosen] if labels is None else (images[chosen], labels[chosen])
    elif isinstance(data, Iterable) and not isinstance(data, Iterator | str | Mapping):
        yield from data
    else:
        raise ValueError(
            f"distill: data is a {type(data).__name__}, expected images (N, C, H, W), a pair of images and labels, or "
            "an iterable of batches that can be gone through again"
        )


def _read(batch: Any, like: Tensor) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
    """Images, labels and further arguments of a batch, on the device of the model."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    if isinstance(batch, Mapping):
        return None, moved(batch.get("labels")), {k: moved(v) for k, v in batch.items() if k != "labels"}
    images, labels = (
        (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, tuple | list) else (batch, None)
    )
    if not is_images(images):
        raise ValueError(f"distill: a batch has {describe(images)} for images; expected a float tensor (N, C, H, W)")
    return moved(images), moved(labels), {}
