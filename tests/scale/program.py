"""What two processes do that torchrun has started: ``program.py JOB FOLDER``; every rank writes what it found.

A job trains the original and the converted network on the same batches, half of each in either process.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from sw_transplant import ShiftwiseConv2d, SWConfig, convert
from tests.runtime_models import CHANNELS, Strips, randomise

STEPS, CLASSES = 20, 5
Result = dict[str, Any]


class Squeezed(nn.Sequential):
    """A block with a residual, so that FSDP has something to wrap."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def plain(*, norm: bool = True) -> nn.Module:
    """Images ``(B, 3, H, W)`` to numbers: strips as in SLaK, and a large square; the same at every call."""
    torch.manual_seed(0)
    blocks = [
        Squeezed(Strips(norm=norm), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.GELU()),
        Squeezed(nn.Conv2d(CHANNELS, CHANNELS, 9, padding=4, groups=CHANNELS), nn.GELU()),
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES))
    return randomise(nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), *blocks, head)).train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Eight images with labels."""
    generator = torch.Generator().manual_seed(step % 4)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, CLASSES, (8,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> list[float]:
    """The losses of this rank's halves."""
    losses = []
    for step in steps:
        images, labels = (part.chunk(2)[dist.get_rank()] for part in batch(step))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp(folder: Path) -> Result:
    result = {}
    for name, model in {"original": plain(), "converted": convert(plain())}.items():
        parallel = DistributedDataParallel(model)
        result[name] = {"losses": train(parallel, optimizer_of(model)), "state": model.state_dict()}
    return {**result, "synchronised": synchronised()}


class GatheredBatchNorm(nn.BatchNorm2d):
    """What SyncBatchNorm computes on GPUs, for the CPU, where it refuses to."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        y = centred * (variance + self.eps).rsqrt()[:, None, None]
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def synchronised() -> Result:
    """Gradients of a batch that is cut in two, with BatchNorms that know of the other half."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convert(plain()))
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = GatheredBatchNorm
    parallel = DistributedDataParallel(model)
    images, labels = (part.chunk(2)[dist.get_rank()] for part in batch(0))
    loss = F.cross_entropy(parallel(images), labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    refused = ""
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(convert(plain()))(images)
    except ValueError as error:
        refused = str(error)
    return {"loss": loss.item(), "gradients": gradients, "refused": refused}


def fsdp(folder: Path) -> Result:
    """Sharded over both processes; half-way written, read again into another model, and trained to the end."""
    result: Result = {}
    for name, make in {"original": plain, "converted": lambda: convert(plain())}.items():
        model = sharded(make())
        optimizer = optimizer_of(model)
        losses = train(model, optimizer, range(STEPS // 2))
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / name)
        losses += train(model, optimizer, range(STEPS // 2, STEPS))
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        result[name] = {"losses": losses, "state": whole}
    layers = [module for module in model.modules() if isinstance(module, ShiftwiseConv2d)]
    kinds = {type(parameter).__name__ for layer in layers for parameter in layer.parameters()}
    return {**result, "kinds": kinds, "refused": folder_of_shards(folder)}


def sharded(model: nn.Module) -> nn.Module:
    for block in model:
        if isinstance(block, Squeezed):
            fully_shard(block)
    return fully_shard(model)


def folder_of_shards(folder: Path) -> str:
    """What transformers says when it shall write a model that is sharded over processes."""
    from tests.hf.models import MODELS

    model = fully_shard(convert(MODELS["ConvNext"].model()))
    try:
        model.save_pretrained(folder / "refused", state_dict=get_model_state_dict(model))
    except NotImplementedError as error:
        return str(error)
    return ""


def accelerate(folder: Path) -> Result:
    """Accelerate's own loop, interrupted half-way; then transformers' Trainer, whose folder is read by one process."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from tests.hf.training import model as small_model
    from tests.hf.training import trainer

    result: Result = {}
    for name, make in {"original": plain, "converted": lambda: convert(plain())}.items():
        accelerator = Accelerator(cpu=True)
        pairs = [pair for step in range(4) for pair in zip(*batch(step), strict=True)]
        model = make()
        model, optimizer, data = accelerator.prepare(model, optimizer_of(model), DataLoader(pairs, batch_size=4))
        losses = []
        for epoch in range(STEPS // 2):
            for images, labels in data:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                losses.append(loss.item())
            if epoch == STEPS // 4:
                accelerator.save_state(str(folder / name))
                kept = copy.deepcopy(accelerator.unwrap_model(model).state_dict())
        last = copy.deepcopy(accelerator.unwrap_model(model).state_dict())
        accelerator.load_state(str(folder / name))
        back = accelerator.unwrap_model(model).state_dict()
        result[name] = {"losses": losses, "state": last, "back": same(back, kept) and not same(back, last)}
    curves = []
    for kind in (None, SWConfig()):
        one = trainer(small_model(kind), folder / "trainer", save_strategy="no", max_steps=STEPS)
        one.train()
        curves.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
    one.save_model(str(folder / "saved"))
    state = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    return {**result, "curves": curves, "trained": state, "processes": one.args.world_size}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(state[name], tensor) for name, tensor in other.items())


JOBS: dict[str, Callable[[Path], Result]] = {"ddp": ddp, "fsdp": fsdp, "accelerate": accelerate}


def main(job: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = JOBS[job](Path(folder))
    torch.save(result, Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
