"""Two models' outputs side by side: the sums over all batches, and the report that is made of them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


class VerificationError(RuntimeError):
    """The two models do not compute the same function within the bound."""


@dataclass(frozen=True)
class Count:
    """So many images of so many."""

    count: int
    of: int

    @property
    def share(self) -> float:
        return self.count / self.of

    def __str__(self) -> str:
        return f"{self.count} of {self.of} ({self.share:.2%})"


@dataclass(frozen=True)
class OutputError:
    """How far one output of the converted model is from the original's, over all images.

    ``relative_rms`` is ``||converted - original|| / ||original||``, NaN where an output is not finite.
    ``not_finite`` counts the NaN and infinite numbers in the output of both models.
    """

    name: str
    relative_rms: float
    max_abs: float
    not_finite: int


@dataclass(frozen=True)
class VerifyReport:
    """The result of :func:`verify`. ``print(report)`` shows it as tables.

    ``ok`` looks at the numbers alone: all finite, every relative RMS error within ``bound``. In a low precision two
    classes that nearly tie may swap within the bound: ``same_top1`` shows that, and it is no failure.
    ``same_top1`` (images that get the same class from both models) is None where there are no logits, ``top1_*`` and
    ``top5_*`` (images whose label is the most likely class, or among the five most likely) are None without labels.
    ``not_compared`` names the outputs that hold no floating-point numbers.
    """

    outputs: tuple[OutputError, ...]
    bound: float
    dtype: str
    device: str
    images: int
    same_top1: Count | None
    top1_original: Count | None
    top1_converted: Count | None
    top5_original: Count | None
    top5_converted: Count | None
    images_per_second_original: float
    images_per_second_converted: float
    not_compared: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every number of every output is finite and every relative RMS error is within the bound."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each output that fails; empty where the models agree."""
        found = []
        for out in self.outputs:
            if out.not_finite:
                found.append(f"{out.name}: {out.not_finite} numbers are NaN or infinite; expected none.")
            elif not out.relative_rms <= self.bound:
                found.append(f"{out.name}: relative RMS error {out.relative_rms:.2e}; the bound is {self.bound:g}.")
        return tuple(found)

    def raise_if_failed(self) -> None:
        """Raise :class:`VerificationError`, which names every output that fails, unless ``ok``."""
        if not self.ok:
            raise VerificationError(
                f"verify: the two models are not the same function ({self.dtype} on {self.device}). "
                f"{' '.join(self.failures)} Where the conversion is approximate on purpose, pass the error you accept "
                f"as bounds=..."
            )

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists, strings and numbers, ready for JSON; NaN and infinity, which JSON lacks, become None."""
        plain: dict[str, Any] = _plain(self)
        return {"ok": self.ok, "failures": list(self.failures), **plain}

    def __str__(self) -> str:
        from rich.box import MARKDOWN
        from rich.console import Console
        from rich.table import Table

        def table(*titles: str) -> Table:
            made = Table(box=MARKDOWN)
            for title in titles:
                made.add_column(title, overflow="fold", justify="left" if title == titles[0] else "right")
            return made

        errors = table("output", "relative RMS error", "largest absolute error", "NaN or infinite")
        for out in self.outputs:
            errors.add_row(out.name, f"{out.relative_rms:.2e}", f"{out.max_abs:.2e}", str(out.not_finite))
        models = table("", "original", "converted")
        if self.top1_original is not None:
            models.add_row("right (top-1)", str(self.top1_original), str(self.top1_converted))
            models.add_row("right within 5 (top-5)", str(self.top5_original), str(self.top5_converted))
        speeds = (self.images_per_second_original, self.images_per_second_converted)
        models.add_row("images per second", *(f"{speed:.1f}" for speed in speeds))
        # A width of its own, and no colour: the text is the same in a narrow terminal, a notebook, a log and a file.
        text = io.StringIO()
        console = Console(file=text, width=100, color_system=None, force_jupyter=False, markup=False, highlight=False)
        verdict = "OK: the same function" if self.ok else "FAILED: not the same function"
        console.print(f"{verdict} on {self.images} images, {self.dtype} on {self.device}")
        console.print(f"relative RMS error allowed: {self.bound:g}")
        console.print(errors)
        if self.same_top1 is not None:
            console.print(f"same class from both models: {self.same_top1}")
        console.print(models)
        for line in self.failures:
            console.print(f"FAILED {line}")
        if self.not_compared:
            console.print(f"not compared (no floating-point numbers): {', '.join(self.not_compared)}")
        lines = (line.rstrip() for line in text.getvalue().strip().splitlines())
        return "\n".join(lines).replace("\n\n\n", "\n\n")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
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
        yield from _leaves(entry, key)


def describe(value: Any) -> str:
    """A value for an error message: dtype and shape of a tensor, else the class."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _float64(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no float64


class Comparison:
    """The sums over all batches that the report is made of."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}  # squared error, squared norm, largest error, numbers not finite
        self.not_compared: dict[str, None] = {}
        self.sizes: list[int] = []
        self.seconds: list[tuple[float, float]] = []
        self.same = self.with_logits = self.labelled = 0
        self.right = [[0, 0], [0, 0]]  # of original, converted: top-1, top-5

    def add(
        self, images: int, labels: Tensor | None, original: tuple[Any, float], converted: tuple[Any, float]
    ) -> None:
        self.sizes.append(images)
        self.seconds.append((original[1], converted[1]))
        pairs = self._pairs(dict(_leaves(original[0])), dict(_leaves(converted[0])))
        for name, (a, b) in pairs.items():
            self._add_numbers(name, _float64(a), _float64(b))
        logits = self._logits(pairs, images, labels)
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
        sums = self.sums.setdefault(name, [0.0] * 4)
        largest = error.abs().max().item() if error.numel() else 0.0
        sums[0] += error.square().sum().item()
        sums[1] += a.square().sum().item()
        sums[2] = largest if largest > sums[2] or math.isnan(largest) else sums[2]
        sums[3] += sum(x.numel() - int(x.isfinite().sum()) for x in (a, b))

    def _logits(
        self, pairs: dict[str, tuple[Tensor, Tensor]], images: int, labels: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        flat = [name for name, (a, _) in pairs.items() if a.ndim == 2 and len(a) == images]
        if "logits" in pairs:
            flat = [name for name in flat if name == "logits"]
        if len(flat) == 1 and flat[0] != "pooler_output":  # Hugging Face's features before the classifier
            return pairs[flat[0]]
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

    def report(self, bound: float, dtype: str, device: str) -> VerifyReport:
        """What all batches so far add up to; there is at least one."""
        timed = slice(1 if len(self.sizes) > 1 else 0, None)  # the first batch also pays for set-up
        speeds = [sum(self.sizes[timed]) / max(sum(times[timed]), 1e-9) for times in zip(*self.seconds, strict=True)]
        top1, top5 = (
            [Count(right[k], self.labelled) if self.labelled else None for right in self.right] for k in (0, 1)
        )
        return VerifyReport(
            outputs=tuple(
                OutputError(name, _ratio(math.sqrt(error), math.sqrt(norm)), largest, int(bad))
                for name, (error, norm, largest, bad) in self.sums.items()
            ),
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


def _ratio(error: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def _plain(value: Any) -> Any:
    if isinstance(value, Count):
        return {"count": value.count, "of": value.of, "share": value.share}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
