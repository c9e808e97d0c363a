"""Fine-tunes a converted Hugging Face classifier with the Trainer, saves it, loads it again and serves it.

    python examples/finetune_huggingface.py                                    # a small ConvNeXt on handwritten digits
    python examples/finetune_huggingface.py --data images --output fine_tuned  # images/CLASS/FILE, of any size
    python examples/finetune_huggingface.py --model folder --data dataset      # of save_pretrained, and of save_to_disk

Nothing is downloaded. `--model` is a local folder of a model; its head is exchanged where the classes are others.
`--data` is a folder with a subfolder of images per class, or what `datasets` saved with the columns image and label;
whoever has such an object in memory calls `fine_tune`. A quarter of every class is held out.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

import sw_transplant as sw
from sw_transplant.hf.trainer import ShiftwiseTrainer
from sw_transplant.tables import render_table

KINDS_OF_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local folder that save_pretrained wrote")
    parser.add_argument("--data", type=Path, help="folder of images in a subfolder per class, or of save_to_disk")
    parser.add_argument("--output", type=Path, help="where the model goes; by default nowhere that stays")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="3e-4 for a given model, 2e-3 for the untrained small one")
    args = parser.parse_args()
    rate = args.learning_rate or (2e-3 if args.model is None else 3e-4)
    try:
        data = digits() if args.data is None else read(args.data)
        with tempfile.TemporaryDirectory() as temporary:
            output = args.output or Path(temporary) / "fine_tuned"
            return fine_tune(data, args.model, output, epochs=args.epochs, batch=args.batch, learning_rate=rate)
    except (ValueError, OSError) as error:
        print(f"finetune_huggingface: {error}", file=sys.stderr)
        return 2


class Data(NamedTuple):
    """Rows ``{"image": PIL.Image, "label": int}`` to train on and held out, as `datasets` has them; class names."""

    train: Sequence[dict[str, Any]]
    held_out: Sequence[dict[str, Any]]
    classes: list[str]


def fine_tune(data: Data, folder: Path | None, output: Path, *, epochs: float, batch: int, learning_rate: float) -> int:
    """Converts, trains, saves to ``output``, loads again and serves; prints a table; returns 1 if anything differs."""
    torch.manual_seed(0)
    original, processor = small_model(data.classes) if folder is None else local_model(folder, data.classes)
    model = sw.convert(original)
    print(sw.summary(model))
    arguments = TrainingArguments(
        str(output / "checkpoints"),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
    )
    trainer = ShiftwiseTrainer(  # makes its optimizer after the conversion: it has to know the new parameters
        model,
        arguments,
        train_dataset=Prepared(data.train, processor),
        eval_dataset=Prepared(data.held_out, processor),
        compute_metrics=lambda p: {"right": int((p.predictions.argmax(-1) == p.label_ids).sum())},
    )
    rows = [("original, before", right(original, data.held_out, processor, batch))]
    rows.append(("converted, before", right(model, data.held_out, processor, batch)))
    trainer.train()
    rows.append(("converted, fine-tuned", right(model, data.held_out, processor, batch)))

    trainer.save_model(str(output))
    processor.save_pretrained(output)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(output, local_files_only=True)
    rows.append(("saved and loaded", right(loaded, data.held_out, processor, batch)))
    same = same_state(model.cpu(), loaded)
    classify = transformers.pipeline("image-classification", model=str(output), top_k=1)
    answers = [classify(row["image"].convert("RGB"))[0]["label"] for row in iterate(data.held_out)]
    labels = [data.classes[row["label"]] for row in iterate(data.held_out)]
    rows.append(("served by pipeline", sum(a == b for a, b in zip(answers, labels, strict=True))))

    total = len(data.held_out)
    cells = [[name, f"{count} of {total} ({count / total:.2%})"] for name, count in rows]
    print(render_table("Held-out images", ["network", "right"], cells))
    counts = dict(rows)
    faults = {
        "the conversion changes answers": counts["original, before"] != counts["converted, before"],
        "the loaded model is another": not same,
        "the loaded model answers otherwise": counts["saved and loaded"] != counts["converted, fine-tuned"],
        "the pipeline answers otherwise": counts["served by pipeline"] != counts["converted, fine-tuned"],
    }
    failed = [fault for fault, holds in faults.items() if holds]
    print(f"FAILED: {'; '.join(failed)}" if failed else "OK")
    return 1 if failed else 0


def same_state(model: nn.Module, other: nn.Module) -> bool:
    """Whether every name and every bit is the same."""
    state, found = model.state_dict(), other.state_dict()
    return list(state) == list(found) and all(torch.equal(found[name], tensor) for name, tensor in state.items())


class Prepared(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as the model takes them."""

    def __init__(self, rows: Sequence[dict[str, Any]], processor: Any) -> None:
        self.rows, self.processor = rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        pixels = self.processor(images=row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": row["label"]}


def iterate(rows: Sequence[dict[str, Any]]) -> Any:
    return (rows[i] for i in range(len(rows)))


@torch.no_grad()
def right(model: PreTrainedModel, rows: Sequence[dict[str, Any]], processor: Any, batch: int) -> int:
    """How many of the rows get their label."""
    model.eval()
    count = 0
    for given in torch.utils.data.DataLoader(Prepared(rows, processor), batch):
        answers = model(given["pixel_values"].to(model.device)).logits.argmax(-1).cpu()
        count += int((answers == given["labels"]).sum())
    return count


# ---- models ----


def small_model(classes: list[str]) -> tuple[PreTrainedModel, Any]:
    config = transformers.ConvNextConfig(
        image_size=64,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        layer_scale_init_value=0.1,  # at ConvNeXt's 1e-6 the blocks would be silent for a long time
        **labels(classes),
    )
    mean = std = [0.5] * 3
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 64}, crop_pct=1, image_mean=mean, image_std=std
    )
    return transformers.ConvNextForImageClassification(config).eval(), processor


def local_model(folder: Path, classes: list[str]) -> tuple[PreTrainedModel, Any]:
    """The model in a folder, with a new head where it has another number of classes."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json; expected a local folder that save_pretrained wrote")
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, ignore_mismatched_sizes=True, **labels(classes)
    )
    return model.float().eval(), transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)


def labels(classes: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


# ---- data ----


def digits() -> Data:
    from sklearn.datasets import load_digits

    given = load_digits()
    pictures = [Image.fromarray((pixels * 15.9375).astype("uint8")) for pixels in given.images]
    rows = [{"image": picture, "label": int(label)} for picture, label in zip(pictures, given.target, strict=True)]
    return hold_out(rows, [str(i) for i in range(10)])


def read(folder: Path) -> Data:
    """Images in a subfolder per class, or what a dataset's ``save_to_disk`` wrote.

    Raises:
        ValueError: it is neither.
    """
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{folder}: needs datasets, which is not installed (pip install datasets)") from error
        return of_datasets(datasets.load_from_disk(str(folder)))
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in KINDS_OF_IMAGES
    ]
    if len(classes) < 2 or not files:
        raise ValueError(f"{folder}: {len(classes)} subfolders, {len(files)} images; expected a subfolder per class")
    return hold_out([OfFile(path, label) for path, label in files], classes)


class OfFile(dict):  # type: ignore[type-arg]
    """A row whose image is read each time it is asked for: not all of a large folder fits into memory."""

    def __init__(self, path: Path, label: int) -> None:
        super().__init__(label=label)
        self.path = path

    def __missing__(self, key: str) -> Image.Image:
        if key != "image":
            raise KeyError(key)
        with Image.open(self.path) as image:
            return image.convert("RGB")


def of_datasets(dataset: Any) -> Data:
    """A ``Dataset``, or a ``DatasetDict`` with "train" and "validation" or "test"; columns image and label.

    Raises:
        ValueError: other columns or splits.
    """
    splits = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
    train = splits.get("train")
    if train is None or not {"image", "label"} <= set(train.features):
        raise ValueError(f"splits {sorted(splits)}: expected 'train' with the columns image and label")
    if held_out is None:
        parts = train.train_test_split(0.25, seed=0, stratify_by_column="label")
        train, held_out = parts["train"], parts["test"]
    return Data(train, held_out, list(train.features["label"].names))


def hold_out(rows: Sequence[dict[str, Any]], classes: list[str]) -> Data:
    """Every fourth of every class is held out, in an order that is drawn once and for all."""
    by_label: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    train, held_out = [], []
    for same in by_label.values():
        random.Random(0).shuffle(same)
        held_out += same[::4]
        train += [row for i, row in enumerate(same) if i % 4]
    return Data(train, held_out, classes)


if __name__ == "__main__":
    sys.exit(main())
