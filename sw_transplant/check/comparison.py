"""Two models' outputs side by side: the sums over all batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sw_transplant.batches import describe
from sw_transplant.check.report import Count, OutputError, VerifyReport

_BEFORE = (
    "Or compare what comes before: verify(original.backbone, converted.backbone, images). Where that agrees, a score "
    "lies on a threshold; where not, the models are not the same function."
)
"""What to do where detections cannot be compared one by one."""


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of everything in a model's output that is not None, in order."""
    entries: Iterable[tuple[str, Any]]
    if isinstance(value, Mapping):
        entries = ((f"{name}.{key}".lstrip("."), entry) for key, entry in value.items())
    elif is_dataclass(value) and not isinstance(value, type):
        entries = ((f"{name}.{f.name}".lstrip("."), getattr(value, f.name)) for f in fields(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        entries = ((f"{name}.{key}".lstrip("."), getattr(value, key)) for key in value._fields)
    elif isinstance(value, tuple | list):
        entries = ((f"{name or 'output'}[{index}]", entry) for index, entry in enumerate(value))
    else:
        if value is not None:
            yield name or "output", value
        return
    for key, entry in entries:
        yield from leaves(entry, key)


def logits_name(outputs: Mapping[str, Any], images: int) -> str | None:
    """Which output holds a number per class: ``logits``, or else the only one of two dimensions. None if none does."""
    flat = [name for name, a in outputs.items() if isinstance(a, Tensor) and a.ndim == 2 and len(a) == images]
    if "logits" in outputs:
        flat = [name for name in flat if name == "logits"]
    # pooler_output: Hugging Face's features before the classifier
    return flat[0] if len(flat) == 1 and flat[0] != "pooler_output" else None


def _float64(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no float64


class Comparison:
    """The sums over all batches that the report is made of."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}  # squared error, squared norm, largest error, numbers not finite
        self.wide: dict[str, list[float]] = {}  # squared norm of the reference, squared errors against it
        self.pictures: dict[str, list[float]] = {}  # least and largest number, and how many there are
        self.not_compared: dict[str, None] = {}
        self.sizes: list[int] = []
        self.seconds: list[tuple[float, float]] = []
        self.same = self.with_logits = self.labelled = self.numbers = 0
        self.right = [[0, 0], [0, 0]]  # of original, converted: top-1, top-5

    def add(
        self,
        images: Tensor,
        labels: Tensor | None,
        original: tuple[Any, float],
        converted: tuple[Any, float],
        wide: tuple[Any, Any] | None = None,
    ) -> None:
        """Adds a batch: both models' outputs and seconds, and what both of them give in wide numbers, where known."""
        self.sizes.append(len(images))
        self.seconds.append((original[1], converted[1]))
        pairs = self._pairs(dict(leaves(original[0])), dict(leaves(converted[0])))
        for name, (a, b) in pairs.items():
            a, b = _float64(a), _float64(b)
            self._add_numbers(name, a, b)
            if _is_picture(a, images):
                self._add_range(name, a)
        if wide is not None:
            self._add_wide(pairs, *(dict(leaves(output)) for output in wide))
        logits = self._logits(pairs, len(images), labels)
        if logits is not None:
            self._add_classes(*logits, labels)

    def _pairs(self, original: dict[str, Any], converted: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        if list(original) != list(converted):
            raise ValueError(
                f"verify: the original returns {', '.join(original) or 'nothing'} and the converted model "
                f"{', '.join(converted) or 'nothing'}; expected the same outputs. Are they the same class of model?"
            )
        pairs = {}
        for name, a in original.items():
            b = converted[name]
            tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
            if tensors and a.ndim and a.shape[1:] == b.shape[1:] and len(a) != len(b):
                raise ValueError(
                    f"verify: {name} has {len(a)} rows from the original and {len(b)} from the converted model: not "
                    f"the same passes its thresholds. {_BEFORE}"
                )
            if (a.shape != b.shape) if tensors else (type(a) is not type(b)):
                raise ValueError(
                    f"verify: {name} is {describe(a)} from the original and {describe(b)} from the converted model; "
                    f"expected the same shape. Are they the same class of model?"
                )
            if tensors and (a.is_floating_point() or a.is_complex()):
                pairs[name] = (a, b)
            else:
                self.not_compared[name] = None
        if not pairs:
            raise ValueError("verify: the models return no floating-point tensor; there is nothing to compare.")
        return pairs

    def _add_numbers(self, name: str, a: Tensor, b: Tensor) -> None:
        error = b.to(a.device) - a
        self.numbers += error.numel()
        sums = self.sums.setdefault(name, [0.0] * 4)
        largest = error.abs().max().item() if error.numel() else 0.0
        sums[0] += error.square().sum().item()
        sums[1] += a.square().sum().item()
        sums[2] = largest if largest > sums[2] or math.isnan(largest) else sums[2]
        sums[3] += sum(x.numel() - int(x.isfinite().sum()) for x in (a, b))

    def _add_range(self, name: str, a: Tensor) -> None:
        least, largest, count = self.pictures.get(name, (math.inf, -math.inf, 0))
        self.pictures[name] = [min(least, a.min().item()), max(largest, a.max().item()), count + a.numel()]

    def _add_wide(
        self, pairs: dict[str, tuple[Tensor, Tensor]], original: dict[str, Any], converted: dict[str, Any]
    ) -> None:
        for name, pair in pairs.items():
            others = [*pair, converted[name]] if converted else [*pair]
            rows = {tuple(other.shape) for other in (original[name], *others)}
            if len(rows) > 1:
                raise ValueError(
                    f"verify: {name} is {describe(pair[0])} from the original, and of another shape in wide numbers "
                    f"({', '.join(map(str, sorted(rows)))}): not the same passes its thresholds, so that rounding "
                    f"cannot be told from difference. Verify in float32 (dtype=torch.float32). {_BEFORE}"
                )
            reference = _float64(original[name])
            sums = self.wide.setdefault(name, [0.0] * (1 + len(others)))
            sums[0] += reference.square().sum().item()
            for place, other in enumerate(others, start=1):
                sums[place] += (_float64(other).to(reference.device) - reference).square().sum().item()

    def _logits(
        self, pairs: dict[str, tuple[Tensor, Tensor]], images: int, labels: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        name = logits_name({name: a for name, (a, _) in pairs.items()}, images)
        if name is not None:
            return pairs[name]
        if labels is not None:
            raise ValueError(
                f"verify: labels came and none of the outputs ({', '.join(pairs)}) is the logits; expected an output "
                f"'logits' (N, classes) or only one output of two dimensions. Leave the labels out."
            )
        return None

    def _add_classes(self, a: Tensor, b: Tensor, labels: Tensor | None) -> None:
        self.with_logits += len(a)
        self.same += int((a.argmax(1).cpu() == b.argmax(1).cpu()).sum())
        if labels is None:
            return
        if labels.min() < 0 or labels.max() >= a.shape[1]:
            raise ValueError(
                f"verify: labels run from {labels.min()} to {labels.max()} and the models tell {a.shape[1]} classes "
                f"apart; expected 0 to {a.shape[1] - 1}. Number the classes as the models do."
            )
        self.labelled += len(labels)
        for right, logits in zip(self.right, (a, b), strict=True):
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
            hits = best == labels[:, None]  # (N, 5)
            right[0] += int(hits[:, 0].sum())
            right[1] += int(hits.any(1).sum())

    def report(
        self, bound: float, dtype: str, device: str, reference: str | None = None, note: str = ""
    ) -> VerifyReport:
        """What all batches so far add up to; there is at least one.

        Args:
            bound, dtype, device: of the comparison.
            reference: dtype of the wide numbers that came with every batch; None where they did not.
            note: about the reference.
        """
        if not self.numbers:
            raise ValueError(
                f"verify: all outputs are empty ({', '.join(self.sums)}), as those of a detector that finds nothing on "
                f"these images: there is nothing to compare. Give images on which it finds something, or lower its "
                f"threshold. {_BEFORE}"
            )
        timed = slice(1 if len(self.sizes) > 1 else 0, None)  # the first batch also pays for set-up
        speeds = [sum(self.sizes[timed]) / max(sum(times[timed]), 1e-9) for times in zip(*self.seconds, strict=True)]
        top1, top5 = (
            [Count(right[k], self.labelled) if self.labelled else None for right in self.right] for k in (0, 1)
        )
        return VerifyReport(
            outputs=tuple(
                OutputError(
                    name,
                    _ratio(math.sqrt(error), math.sqrt(norm)),
                    largest,
                    int(bad),
                    *(self._wide_errors(name) if reference is not None else (None, None, None)),
                    self._psnr(name, error),
                )
                for name, (error, norm, largest, bad) in self.sums.items()
            ),
            reference=reference,
            reference_note=note,
            bound=bound,
            dtype=dtype,
            device=device,
            images=sum(self.sizes),
            same_top1=Count(self.same, self.with_logits) if self.with_logits else None,
            top1_original=top1[0],
            top1_converted=top1[1],
            top5_original=top5[0],
            top5_converted=top5[1],
            images_per_second_original=speeds[0],
            images_per_second_converted=speeds[1],
            not_compared=tuple(self.not_compared),
        )

    def _wide_errors(self, name: str) -> tuple[float | None, float | None, float | None]:
        norm, *errors = self.wide[name]
        original, converted, *function = (_ratio(math.sqrt(error), math.sqrt(norm)) for error in errors)
        return original, converted, function[0] if function else None

    def _psnr(self, name: str, error: float) -> float | None:
        """Decibels between the squared range of a picture's numbers and the mean squared error."""
        if name not in self.pictures or not math.isfinite(error):
            return None
        least, largest, count = self.pictures[name]
        if error == 0:
            return math.inf
        return 10 * math.log10((largest - least) ** 2 * count / error) if largest > least else None


def _is_picture(output: Tensor, images: Tensor) -> bool:
    """Whether an output can be an image made of the image that went in: its channels, its size or a multiple of it."""
    if output.ndim != 4 or output.shape[:2] != images.shape[:2]:
        return False
    down, across = (out // size for out, size in zip(output.shape[2:], images.shape[2:], strict=True))
    return down == across >= 1 and output.shape[2:] == (down * images.shape[2], across * images.shape[3])


def _ratio(error: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm
