"""A small model in the hands of transformers' Trainer, the same every time; as a program, one that dies on the way.

python -m tests.hf.training FOLDER     # trains, and is killed while it writes its second checkpoint
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from sw_transplant import SWConfig, convert
from tests.hf.models import MODELS

STEPS, EVERY = 6, 2


class Pictures(Dataset):
    """Seeded noise with labels."""

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(count, 3, 64, 64, generator=generator)
        self.labels = torch.randint(0, 5, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def model(config: SWConfig | None = SWConfig()) -> Any:  # noqa: B008  it is frozen
    """Converted; with None the plain one."""
    plain = MODELS["ConvNext"].model()
    return plain if config is None else convert(plain, config)


def trainer(one: Any, folder: Path, *, kind: type[Trainer] = Trainer, **arguments: Any) -> Trainer:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": EVERY,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        **arguments,
    }
    data = Pictures()
    return kind(
        one,
        TrainingArguments(str(folder), **given),
        train_dataset=data,
        eval_dataset=torch.utils.data.Subset(data, range(4)),
    )


def main(folder: str) -> None:
    torch.set_num_threads(1)
    running = trainer(model(), Path(folder))
    save = torch.save

    def die(thing: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if running.state.global_step == 2 * EVERY and Path(path).name == "optimizer.pt":
            save(thing, path)
            os.truncate(path, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        save(thing, path, *args, **kwargs)

    torch.save = die
    running.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
