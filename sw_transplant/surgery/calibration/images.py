"""What a user gives as calibration images, and the runs of a model that this makes.

A tensor, batches of tensors, of pairs or of dicts, or a function that runs the model itself. Each is gone through many
times; a run is one call of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.batches import describe, is_images

Run = Callable[[nn.Module], Any]
"""Calls a model on one batch."""

FORMS = (
    "a tensor (N, C, H, W), an iterable that can be gone through again (a list, a DataLoader) of such tensors, of "
    "pairs (images, labels) or of dicts of the forward's arguments, a function that runs the model it is given, or "
    "'synthetic'"
)
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Images:
    """Calibration images, ready to be run.

    Attributes:
        data: what came, batches or a function; lists where it could be gone through once only.
        batch_size: of a single tensor.
        held_out: the share of the images that is not calibrated on.
    """

    data: Any
    batch_size: int
    held_out: float

    @property
    def is_function(self) -> bool:
        """Whether a function runs the model, as often as it likes, rather than one run per batch."""
        return callable(self.data) and not isinstance(self.data, Iterable)

    def runs(self, *, held_out: bool = False) -> Iterator[Run]:
        """The runs to calibrate on, or those that were held out for counting."""
        if self.is_function:
            if not held_out:
                yield self.data
            return
        for number, batch in enumerate(self._batches(held_out)):
            yield _Call(batch, number)

    def _batches(self, held_out: bool) -> Iterator[Any]:
        if isinstance(self.data, Tensor):
            cut = len(self.data) - int(len(self.data) * self.held_out)
            part = self.data[cut:] if held_out else self.data[:cut]
            yield from part.split(self.batch_size) if len(part) else ()
            return
        every = round(1 / self.held_out) if self.held_out else 0
        for number, batch in enumerate(self.data, start=1):
            if (every > 0 and number % every == 0) == held_out:
                yield batch


class _Call:
    """Calls a model on one batch, on its device and in its dtype."""

    def __init__(self, batch: Any, number: int) -> None:
        self.batch, self.number = batch, number

    def __call__(self, model: nn.Module) -> Any:
        batch, like = self.batch, next((p for p in model.parameters() if p.is_floating_point()), None)
        if isinstance(batch, Mapping):
            takes = inspect.signature(model.forward).parameters
            kept = {str(key): value for key, value in batch.items() if key not in _LABELS or key in takes}
            return model(**{key: _moved(value, like) for key, value in kept.items() if key not in _LABELS})
        images = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(images, Tensor):
            raise ValueError(f"calibration: batch {self.number} has {describe(images)}; expected {FORMS}")
        if not is_images(images) or not images.numel():
            raise ValueError(
                f"calibration: batch {self.number} has a {images.dtype} tensor {tuple(images.shape)} for images; "
                f"expected {FORMS}"
            )
        return model(_moved(images, like))


def read_images(data: Any, batch_size: int = 16, held_out: float = 0.0) -> Images:
    """Checks what came as calibration images.

    Raises:
        ValueError: it is none of :data:`FORMS`, empty, or not finite.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"calibration: batch_size {batch_size!r}, expected an integer of at least 1")
    if not 0 <= held_out <= 0.5:
        raise ValueError(f"calibration: held_out {held_out!r}, expected a share of the images from 0 to 0.5")
    if isinstance(data, str) or not (isinstance(data, Iterable) or callable(data)) or isinstance(data, nn.Module):
        raise ValueError(f"calibration: got {type(data).__name__} {str(data)[:40]!r}, expected {FORMS}")
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, Tensor):
        if not is_images(data) or not len(data):
            raise ValueError(
                f"calibration: a {data.dtype} tensor {tuple(data.shape)}, expected images (N, C, H, W), preprocessed "
                "as the model takes them, N at least 1"
            )
        if not bool(torch.isfinite(data).all()):
            raise ValueError("calibration: the images hold NaN or infinity; expected finite numbers, leave them out")
    elif isinstance(data, Iterator):
        data = list(data)
    images = Images(data, batch_size, held_out)
    if not images.is_function and next(images.runs(), None) is None:
        raise ValueError(f"calibration: there are no images in this {type(data).__name__}; expected {FORMS}")
    return images


def _moved(value: Any, like: Tensor | None) -> Any:
    """A copy, for a model may write into what it gets; floating-point tensors in the dtype of the model."""
    if isinstance(value, Tensor) and like is not None:
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype, copy=True)
    return value
