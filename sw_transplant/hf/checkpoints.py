"""Which checkpoint of a Trainer is whole: one that was being written when the process died is not."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

PREFIX = "checkpoint-"
STATE_NAME = "trainer_state.json"
"""What Trainer writes last, when all other files are there."""


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in a Trainer's output folder that was written to its end.

        trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))

    ``resume_from_checkpoint=True`` takes the newest folder instead, whatever is in it.

    Args:
        folder: ``TrainingArguments.output_dir``; it need not exist yet.

    Returns:
        The path of the checkpoint; None where there is none, so that training starts from the beginning.
    """
    numbered = []
    for path in Path(folder).glob(f"{PREFIX}*"):
        if match := re.fullmatch(rf"{PREFIX}(\d+)", path.name):
            numbered.append((int(match[1]), path))
    for step, path in sorted(numbered, reverse=True):
        if _is_whole(path, step):
            return str(path)
    return None


def _is_whole(checkpoint: Path, step: int) -> bool:
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        for index in checkpoint.rglob("*.safetensors.index.json"):
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if not all((index.parent / name).is_file() for name in named):
                return False
        for weights in checkpoint.rglob("*.safetensors"):
            with safe_open(weights, framework="pt"):  # compares the file's size with what its header says
                pass
        return bool(state["global_step"] == step)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
