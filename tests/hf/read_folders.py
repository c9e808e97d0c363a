"""Reads folders of models in a process of its own, with this package or where importing it is impossible.

    python read_folders.py with|without jobs.json results.pt

A job is a folder, the class that reads it, and a file with images. A result is what came of it: keys that were missing
or left over, the number of Shiftwise layers, the outputs, the state_dict, or the error. Imports nothing of the tests.
"""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace
from typing import Any


def main(mode: str, jobs: str, results: str) -> None:
    if mode == "without":
        sys.modules["sw_transplant"] = None  # type: ignore[assignment]  # importing it raises ImportError
    else:
        import sw_transplant.hf  # noqa: F401
    import torch
    import transformers
    from transformers.models.auto import auto_factory

    torch.set_num_threads(1)
    # AutoBackbone asks the hub whether it knows the folder; there is no hub here.
    auto_factory.hf_api = lambda: SimpleNamespace(repo_exists=lambda _: True)
    transformers.utils.logging.disable_progress_bar()
    with open(jobs) as file:
        entries = json.load(file)
    torch.save([read(torch, transformers, **entry) for entry in entries], results)


def read(torch: Any, transformers: Any, folder: str, reader: str, images: str, pipeline: bool) -> dict[str, Any]:
    try:
        model, report = getattr(transformers, reader).from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    model = copy.deepcopy(model)  # into memory of the usual alignment, on which rounding depends
    with torch.no_grad():
        outputs = leaves(torch, model(pixel_values=torch.load(images)))
    kinds = [type(module).__name__ for module in model.modules()]
    return {
        **{what: sorted(report[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "shiftwise": sum(kind in ("ShiftwiseConv2d", "SWConv2d") for kind in kinds),
        "outputs": outputs,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "scores": scores(transformers, folder) if pipeline else None,
    }


def leaves(torch: Any, output: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def scores(transformers: Any, folder: str) -> list[float]:
    """What a pipeline that is made from the folder alone says of a picture."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((80, 72)).convert("RGB")
    answers = transformers.pipeline("image-classification", model=folder, top_k=5)(picture)
    return [answer["score"] for answer in sorted(answers, key=lambda answer: answer["label"])]


if __name__ == "__main__":
    main(*sys.argv[1:])
