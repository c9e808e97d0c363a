"""Converts a Hugging Face model, fine-tunes it for a few steps with plain PyTorch, saves it and loads it again.

    python examples/convert_huggingface.py                      # a small ConvNeXt with random weights
    python examples/convert_huggingface.py path/to/folder       # what save_pretrained wrote; nothing is downloaded
    python examples/convert_huggingface.py --freeze-backbone    # train the head alone

Image classifiers (ConvNeXt, ConvNeXt V2, ...) learn digits, segmentation models (UperNet, ...) where their ink is. The
original is trained beside the converted model on the same images. Both have the same gradients and the same losses: a
kernel that is laid out as tiles is trained like the kernel it came from.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from digits import prepare
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import PreTrainedModel

import sw_transplant as sw
from sw_transplant.check.model_input import ModelInput
from sw_transplant.tables import render_table

BATCH = 16
TASKS = ("ForImageClassification", "ForSemanticSegmentation")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="local folder that save_pretrained wrote")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--freeze-backbone", action="store_true", help="train the head alone")
    args = parser.parse_args()
    try:
        original = small_model() if args.folder is None else local_model(args.folder)
        if args.freeze_backbone:
            backbone(original).requires_grad_(False)
        converted = sw.convert(original)  # a copy, in which what was frozen stays frozen
    except ValueError as error:  # also where there is nothing to convert
        print(f"convert_huggingface: {error}", file=sys.stderr)
        return 2
    print(sw.summary(converted))
    report = sw.verify(original, converted)
    print(f"\n{report}\n")

    batches = digit_batches(original, args.steps)
    kernels, banks = large_kernels(original)
    before = fine_tune(original, batches, args.learning_rate, kernels)
    after = fine_tune(converted, batches, args.learning_rate, banks)
    print(gradient_table(kernels, before, after))
    print(loss_table(before, after))

    with tempfile.TemporaryDirectory() as folder:
        sw.save(converted, folder)
        loaded = sw.load(type(original)(original.config), folder)
    difference = sw.verify(converted, loaded, bounds=0)
    print(f"fine-tuned, saved and loaded: {'the same, bit for bit' if difference.ok else 'NOT the same'}")

    faults = {
        "the converted model is not the same function": not report.ok,
        "the two models were not trained alike": not alike(before, after),
        "a frozen layer has a gradient": args.freeze_backbone and any(after.gradients),
        "no Shiftwise layer has a gradient": not args.freeze_backbone and not any(after.gradients),
        "the loaded model is another": not difference.ok,
    }
    failed = [fault for fault, holds in faults.items() if holds]
    print(f"FAILED: {'; '.join(failed)}" if failed else "OK")
    return 1 if failed else 0


def small_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        num_channels=1,
        num_labels=10,
        image_size=32,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        layer_scale_init_value=0.1,  # at ConvNeXt's 1e-6 the blocks would be silent for a long time
    )
    return transformers.ConvNextForImageClassification(config).eval()


def local_model(folder: Path) -> PreTrainedModel:
    """The model that ``save_pretrained`` wrote, by the class that its config names.

    Raises:
        ValueError: there is none, or it has no task that this example can train.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json; expected a local folder that save_pretrained wrote")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (config.architectures or ["a model without a head"])[0]
        if not name.endswith(TASKS):
            raise ValueError(f"{folder}: holds {name}; this example can train models {' and '.join(TASKS)}")
        model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read; was it written by save_pretrained? ({error})") from error
    return model.float().eval()


def backbone(model: PreTrainedModel) -> nn.Module:
    """All but the head: Hugging Face has it under ``base_model``, and under ``backbone`` in models built around one."""
    found: nn.Module = getattr(model, "backbone", model.base_model)
    if found is model:
        raise ValueError(f"--freeze-backbone: {type(model).__name__} has no backbone that could be told from its head")
    return found


def digit_batches(model: PreTrainedModel, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of digits in the size that the model takes, labelled for its task."""
    data = load_digits()
    channels, *size = ModelInput.of(model).shape
    batches = []
    for chosen in (torch.arange(count * BATCH) % len(data.target)).split(BATCH):
        images = prepare(data.images[chosen], size=(size[0], size[1]), mean=0.5, std=0.5)
        is_ink, digit = (images[:, 0] > 0).long(), torch.as_tensor(data.target)[chosen]
        labels = is_ink if type(model).__name__.endswith("ForSemanticSegmentation") else digit
        batches.append((images.expand(-1, channels, -1, -1), labels % model.config.num_labels))
    return batches


def large_kernels(original: nn.Module) -> tuple[list[str], list[str]]:
    """The parameters of the large convolutions: their names in the original, and those of the banks made of them."""
    pairs = [
        (f"{match.path}.{branch.weight}", f"{match.path}.branches.{number}.bank")
        for match in sw.inspect_model(original).matches
        for number, branch in enumerate(match.branches)
        if branch.weight is not None
    ]
    return [kernel for kernel, _ in pairs], [bank for _, bank in pairs]


class Training(NamedTuple):
    losses: list[float]
    gradients: list[float]
    """Norms in the first step, of the parameters asked for; 0 where there is none, as in frozen layers."""


def fine_tune(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], learning_rate: float, watched: Sequence[str]
) -> Training:
    """An ordinary training loop. The optimizer is made after the conversion: it has to know the new parameters."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=learning_rate)
    losses, gradients = [], []
    model.train()
    for step, (images, labels) in enumerate(batches):
        torch.manual_seed(step)  # the same dropout in both models
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found = [parameters[name].grad for name in watched]
            gradients = [0.0 if gradient is None else gradient.norm().item() for gradient in found]
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return Training(losses, gradients)


def alike(a: Training, b: Training) -> bool:
    """Equal but for rounding, which grows a little from step to step."""
    return all(torch.allclose(torch.tensor(x), torch.tensor(y), rtol=1e-3) for x, y in zip(a, b, strict=True))


def gradient_table(layers: Sequence[str], original: Training, converted: Training) -> str:
    rows = [
        [layer, *(f"{norm:.4e}" if norm else "none" for norm in norms)]
        for layer, *norms in zip(layers, original.gradients, converted.gradients, strict=True)
    ]
    return render_table("Norm of the gradient in the first step", ["kernel", "original", "converted"], rows) + "\n"


def loss_table(original: Training, converted: Training) -> str:
    rows = [
        [str(step), *(f"{loss:.6f}" for loss in losses)]
        for step, *losses in zip(range(1, 1 + len(original.losses)), original.losses, converted.losses, strict=True)
    ]
    return render_table("Fine-tuning", ["step", "loss of the original", "loss of the converted"], rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
