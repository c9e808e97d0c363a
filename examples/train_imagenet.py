"""Trains a published recipe from scratch, by timm's own parts, with the pruning and growing of the papers.

    torchrun --nproc-per-node=8 examples/train_imagenet.py sw_tiny_300 --data imagenet --output runs/sw_tiny
    python examples/train_imagenet.py "sw#11" --data imagenet --epochs 120       # a step of the ladder

--data has the folders train and val, each with a folder per class. Nothing is downloaded. One process runs on the GPU
or the CPU; torchrun gives as many as it is told to. An interrupted run goes on with --resume as if nothing had
happened: what is drawn in an epoch follows from the seed and its number. On a CPU the weights are the same, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, auto_augment, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import (
    AverageMeter,
    ModelEmaV3,
    accuracy,
    distribute_bn,
    init_distributed_device,
    random_seed,
    reduce_tensor,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sw_transplant.models  # noqa: F401  registers the networks
from sw_transplant.science.ladder import LADDER
from sw_transplant.science.recipes import RECIPES, Recipe
from sw_transplant.sparsity import FilterSparsity, follow_masks, sparsity_report


def main() -> int:
    arguments = parse()
    device = init_distributed_device(arguments)
    random_seed(arguments.seed)  # first weights: the same in all processes
    recipe, model = build(arguments)
    train_loader, val_loader, mixup = load(recipe, arguments, device)
    accumulated = max(1, recipe.batch_size // (arguments.batch_size * arguments.world_size))
    steps = max(1, len(train_loader) // accumulated)
    model.to(device)

    sparsity = prune(model, recipe, arguments, steps)
    if sparsity is not None and arguments.resume is None:
        images, labels = mixup(*(tensor.to(device) for tensor in next(iter(train_loader))))
        sparsity.initialise((images, labels, SoftTargetCrossEntropy()))
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay,
        layer_decay=None if recipe.layer_decay == 1 else recipe.layer_decay,
    )  # fmt: skip
    if sparsity is not None:
        sparsity.attach(optimizer)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=(recipe.epochs - recipe.warmup_epochs) * steps, lr_min=recipe.min_lr, t_in_epochs=False,
        warmup_t=recipe.warmup_epochs * steps, warmup_prefix=True,
    )  # fmt: skip
    ema = None if recipe.ema_decay is None else follow_masks(ModelEmaV3(model, decay=recipe.ema_decay))
    start = 0
    if arguments.resume is not None:
        start = resume(arguments.resume, model, ema, optimizer)
    network: nn.Module = model
    if arguments.distributed:
        network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    for epoch in range(start, min(recipe.epochs, arguments.stop_epoch or recipe.epochs)):
        begin(epoch, train_loader, arguments)
        loss = train(network, train_loader, mixup, optimizer, scheduler, ema, accumulated, epoch * steps, device)
        if arguments.distributed:
            distribute_bn(model, arguments.world_size, reduce=True)
        top1 = evaluate(model, val_loader, arguments, device)
        if arguments.rank == 0:
            use = "" if sparsity is None else f", {sparsity_report(model).totals[0].density:.1%} in use"
            print(f"epoch {epoch}: loss {loss:.4f}, top-1 {top1:.2f}%{use}", flush=True)
            save(arguments.output, model, ema, optimizer, epoch)
    if ema is not None and (arguments.stop_epoch or recipe.epochs) >= recipe.epochs:
        if recipe.bn_pass:
            begin(recipe.epochs, train_loader, arguments)
            torch.optim.swa_utils.update_bn((images.to(device) for images, _ in train_loader), ema.module)
        if arguments.distributed:
            distribute_bn(ema.module, arguments.world_size, reduce=recipe.bn_pass)
        top1 = evaluate(ema.module, val_loader, arguments, device)
        if arguments.rank == 0:
            print(f"averaged weights: top-1 {top1:.2f}%")
            save(arguments.output, model, ema, optimizer, recipe.epochs - 1)
    if arguments.distributed:
        torch.distributed.destroy_process_group()
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help=f"{', '.join(RECIPES)}; or a step of the ladder, sw#0 to sw#27")
    parser.add_argument("--data", type=Path, required=True, help="with the folders train and val")
    parser.add_argument("--output", type=Path, default=Path("run"), help="folder of the checkpoint (%(default)s)")
    parser.add_argument("--resume", type=Path, help="a checkpoint of this script")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--stop-epoch", type=int, help="end before this one, on the same schedule; go on with --resume")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a process at once (%(default)s)")
    parser.add_argument("--total-batch", type=int, help="of all processes and accumulated steps; default: the recipe's")
    parser.add_argument("--size", type=int, default=224, help="of the images (%(default)s)")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--model", default="{}", help='arguments of the network as JSON, {"num_classes": 10}')
    parser.add_argument("--dynamics", choices=("exact", "published"), default="exact", help="of pruning and growing")
    parser.add_argument("--sparsity", type=float, help="share out of use; 0 trains a dense network")
    parser.add_argument("--prune-rate", type=float, help="share of what is used that an update exchanges")
    parser.add_argument("--update-frequency", type=int, help="steps from one update of the masks to the next")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for part in ("train", "val"):
        if not (arguments.data / part).is_dir():
            parser.error(f"--data {arguments.data}: no folder {part}; expected train and val, with a folder per class")
    if arguments.recipe not in RECIPES and arguments.recipe not in LADDER:
        parser.error(f"recipe {arguments.recipe!r}: expected one of {', '.join([*RECIPES, *LADDER])}")
    return arguments


def build(arguments: argparse.Namespace) -> tuple[Recipe, nn.Module]:
    """The recipe, with what was asked for instead, and its network."""
    settings: dict[str, Any] = {
        "num_classes": sum(entry.is_dir() for entry in (arguments.data / "train").iterdir()),
        **json.loads(arguments.model),
    }
    if arguments.recipe in LADDER:
        recipe = LADDER[arguments.recipe].recipe()
        model = LADDER[arguments.recipe].build(**settings)
    else:
        recipe = RECIPES[arguments.recipe]
        settings = {"drop_path_rate": recipe.drop_path or 0.0, "layer_scale_init_value": recipe.layer_scale, **settings}
        model = timm.create_model(recipe.model, **settings)
    recipe = changed(recipe, epochs=arguments.epochs, batch_size=arguments.total_batch)
    if recipe.pruning is not None:
        pruning = changed(
            recipe.pruning, sparsity=arguments.sparsity, prune_rate=arguments.prune_rate,
            update_frequency=arguments.update_frequency,
        )  # fmt: skip
        recipe = replace(recipe, pruning=pruning if pruning.sparsity else None)
    return replace(recipe, warmup_epochs=min(recipe.warmup_epochs, recipe.epochs // 2)), model


def changed(settings: Any, **values: Any) -> Any:
    """A copy with those values that are given."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def load(recipe: Recipe, arguments: argparse.Namespace, device: torch.device) -> tuple[Any, Any, Mixup]:
    """Augmented training images, validation images, and what mixes a batch."""
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    shape = (3, arguments.size, arguments.size)
    common = {
        "input_size": shape, "batch_size": arguments.batch_size, "num_workers": arguments.workers, "device": device,
        "use_prefetcher": False, "distributed": arguments.distributed, "persistent_workers": False,
    }  # fmt: skip
    train_set = create_dataset("", root=str(arguments.data / "train"))
    val_set = create_dataset("", root=str(arguments.data / "val"))
    train_loader = create_loader(
        train_set, is_training=True, auto_augment=recipe.auto_augment, color_jitter=recipe.color_jitter,
        re_prob=recipe.erasing, re_mode="pixel", interpolation="bicubic", **common,
    )  # fmt: skip
    val_loader = create_loader(val_set, is_training=False, interpolation="bicubic", crop_pct=0.875, **common)
    classes = len(train_set.reader.class_to_idx)
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
    return train_loader, val_loader, mixup


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """RandAugment's strongest posterization keeps no bits: a black image, which newer versions of Pillow refuse."""
    return ImageOps.posterize(image, bits) if bits else image.point(lambda _: 0)


def prune(model: nn.Module, recipe: Recipe, arguments: argparse.Namespace, steps: int) -> FilterSparsity | None:
    """What takes filters or weights out of use while the network trains."""
    pruning = recipe.pruning
    if pruning is None:
        return None
    return FilterSparsity(
        model, pruning.sparsity, only_L=pruning.only_L, adaptation_rate=pruning.prune_rate,
        update_frequency=pruning.update_frequency, sparse_gap=pruning.sparse_gap or 1,
        total_steps=recipe.epochs * steps, seed=arguments.seed, dynamics=arguments.dynamics,
    )  # fmt: skip


def begin(epoch: int, loader: Any, arguments: argparse.Namespace) -> None:
    """What is drawn from here on follows from the seed, the epoch and the process."""
    random_seed(arguments.seed + (epoch + 1) * arguments.world_size, arguments.rank)
    if arguments.distributed:
        loader.sampler.set_epoch(epoch)


def train(
    model: nn.Module, loader: Any, mixup: Mixup, optimizer: Any, scheduler: Any, ema: Any, accumulated: int, step: int,
    device: torch.device,
) -> float:  # fmt: skip
    """One epoch; the mean loss."""
    model.train()
    losses, criterion = AverageMeter(), SoftTargetCrossEntropy()
    for number, (images, labels) in enumerate(loader):
        if number // accumulated >= max(1, len(loader) // accumulated):
            break  # too few are left for a step
        images, targets = mixup(images.to(device), labels.to(device))
        loss = criterion(model(images), targets)
        (loss / accumulated).backward()
        losses.update(loss.item(), len(images))
        if (number + 1) % accumulated and number + 1 < len(loader):
            continue
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        scheduler.step_update(step)
        if ema is not None:
            ema.update(getattr(model, "module", model))
    return losses.avg


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, arguments: argparse.Namespace, device: torch.device) -> float:
    """Top-1 in percent, of the images of all processes."""
    model.eval()
    right = AverageMeter()
    for images, labels in loader:
        (top1,) = accuracy(model(images.to(device)), labels.to(device))
        if arguments.distributed:
            top1 = reduce_tensor(top1, arguments.world_size)
        right.update(float(top1), len(images))
    return right.avg


def save(folder: Path, model: nn.Module, ema: Any, optimizer: Any, epoch: int) -> None:
    """The checkpoint, as ``sw_transplant.models.load_checkpoint`` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    if ema is not None:
        content["model_ema"] = ema.module.state_dict()
    torch.save(content, folder / "writing.pth")
    (folder / "writing.pth").replace(folder / "checkpoint.pth")  # who is interrupted here keeps the last one


def resume(path: Path, model: nn.Module, ema: Any, optimizer: Any) -> int:
    """Puts everything back; the epoch to go on with. Masks are in the model, their count of steps in the optimizer."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if ema is not None:
        ema.module.load_state_dict(content["model_ema"])
    return content["epoch"] + 1


if __name__ == "__main__":
    sys.exit(main())
