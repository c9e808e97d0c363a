"""Whether two models compute the same function: every output compared number by number, and the classes they choose."""

from __future__ import annotations

import copy
import inspect
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .images import ModelInput

__all__ = ["BOUNDS", "TF32_BOUND", "Count", "OutputError", "VerificationError", "VerifyReport", "bound_for", "verify"]

# The relative RMS error that an exact conversion stays below, by the type of number the model computes in.
BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
TF32_BOUND = 2e-3  # float32 in memory, multiplied with the 10 bits of mantissa that float16 has


class VerificationError(RuntimeError):
    """The two models do not compute the same function within the bound."""


def bound_for(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """The relative RMS error allowed between two models that compute the same function.

    Args:
        dtype: what the models compute in.
        device: where; float32 on CUDA counts as TF32 if PyTorch may use TF32 in convolutions or matrix products.

    Raises:
        NotImplementedError: a dtype that the table has no bound for.
    """
    if dtype not in BOUNDS:
        raise NotImplementedError(
            f"bound_for: there is no bound for {dtype} (there is for {', '.join(map(str, BOUNDS))}). "
            f"Give one yourself: verify(..., bounds=...)."
        )
    if dtype is torch.float32 and torch.device(device).type == "cuda":
        backends = torch.backends
        precisions = (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)  # type: ignore[attr-defined]
        return TF32_BOUND if "tf32" in precisions else BOUNDS[dtype]
    return BOUNDS[dtype]


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


def verify(
    original: nn.Module,
    converted: nn.Module,
    data: Any = None,
    *,
    bounds: float | None = None,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    max_batches: int | None = None,
    input_size: int | tuple[int, ...] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> VerifyReport:
    """Run two models on the same images, in eval mode, and compare everything they return.

    Both models see the same random state in every batch, and get their training flags back, also after an error.
    Norms are added up in float64 over all batches. The speeds, for information, leave out the first of several batches.

    Args:
        original: the reference.
        converted: the model under test; it must return the same structure of outputs.
        data: None for two batches of seeded normal noise of the size the original takes (see ``ModelInput.of``); else
            a tensor (N, C, H, W); a pair (images (N, C, H, W), labels (N,)); a dict with ``pixel_values``, optional
            ``labels`` (N,) and whatever else the forward takes; or an iterable, such as a DataLoader or what
            ``load_images`` returns, of any of these. Floating-point tensors are cast to each model's dtype.
        bounds: the relative RMS error allowed; None takes :func:`bound_for` the coarsest dtype among both models'
            floating-point parameters (and autocast's, inside it) on their device.
        batch_size: how many images of one tensor, pair or of the noise make a batch.
        device, dtype: where given, COPIES of both models are moved there and run; the models stay as they are.
        max_batches: stop after this many batches.
        input_size: S, (H, W) or (C, H, W) of the noise, where ``data`` is None.
        seed: of the noise, and of whatever is random inside the models.
        progress: show a progress bar on stderr where that is a terminal.

    Returns:
        A :class:`VerifyReport`. An output is named by its place, such as ``logits`` or ``hidden_states[2]``; a model
        that returns one tensor has one ``output``. The class of an image is read from ``logits`` (N, classes), or else
        from the only output of two dimensions.

    Raises:
        ValueError: empty data or data of another form, labels that do not fit, or two models whose outputs differ in
            structure or shape.
        NotImplementedError: a dtype without a bound, and no ``bounds``.
    """
    for name, model in (("original", original), ("converted", converted)):
        if not isinstance(model, nn.Module):
            raise ValueError(f"verify: {name} is a {type(model).__name__}; expected a torch.nn.Module.")
    for name, value in (("batch_size", batch_size), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise ValueError(f"verify: {name} is {value}; expected at least 1.")
    if bounds is not None and not bounds >= 0:
        raise ValueError(f"verify: bounds is {bounds}; expected None or a relative RMS error of 0 or more.")
    if data is not None and input_size is not None:
        raise ValueError("verify: input_size is the size of the noise that data=None makes; leave one of the two out.")
    if data is None:
        data = _noise(original, input_size, batch_size, seed)
    if device is not None or dtype is not None:
        original, converted = copy.deepcopy((original, converted))
        for model in (original, converted):
            model.to(device=device, dtype=dtype)
    devices = [_devices(original)[0], _devices(converted)[0]]
    dtypes = _dtypes(original) + _dtypes(converted)
    dtypes += [torch.get_autocast_dtype(d.type) for d in devices if torch.is_autocast_enabled(d.type)]
    coarsest = max(dtypes, key=lambda kind: torch.finfo(kind).eps)
    bound = max(bound_for(coarsest, d) for d in devices) if bounds is None else bounds

    comparison = _Comparison()
    batches = _split(data, batch_size)
    total = min(length_hint(batches, sys.maxsize), max_batches or sys.maxsize)
    # Not inference_mode: what a model caches under it, an assembled kernel for instance, could not be trained through.
    with torch.no_grad(), _evaluating(original), _evaluating(converted), _progress_bar(progress, total) as advance:
        for index, batch in enumerate(map(_read_batch, batches), start=1):
            comparison.add(batch, _run(original, batch, seed), _run(converted, batch, seed))
            advance()
            if index == max_batches:
                break
    return comparison.report(bound, str(coarsest).removeprefix("torch."), str(devices[0]))


class _Batch(NamedTuple):
    images: Tensor  # (N, C, H, W)
    labels: Tensor | None  # (N,)
    others: dict[str, Any]  # further arguments of the forward


def _noise(model: nn.Module, input_size: int | tuple[int, ...] | None, batch_size: int, seed: int) -> list[Tensor]:
    shape: tuple[int, ...] = ModelInput.of(model).shape
    if input_size is not None:
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        shape = (*shape[: max(0, 3 - len(size))], *size)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"verify: input_size is {input_size}; expected S, (H, W) or (C, H, W), each at least 1.")
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, *shape, generator=generator) for _ in range(2)]


_FORMS = "images (N, C, H, W), a pair (images, labels), a dict with 'pixel_values', or an iterable of these"
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _split(data: Any, batch_size: int) -> Iterable[Any]:
    """The batches of the data, not yet looked into; a tensor or a pair of tensors is cut into several."""
    if isinstance(data, Tensor) and data.ndim:
        return data.split(batch_size)
    if isinstance(data, Tensor | Mapping):
        return [data]
    if isinstance(data, tuple | list) and len(data) == 2 and _is_images(data[0]) and not _is_batch(data[1]):
        images, labels, _ = _read_batch(data)  # before cutting, which would hide that there are more labels than images
        cut = images.split(batch_size)
        return cut if labels is None else list(zip(cut, labels.split(batch_size), strict=True))
    if isinstance(data, Iterable):
        return data
    raise ValueError(f"verify: data is a {type(data).__name__}; expected {_FORMS}.")


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _is_batch(value: Any) -> bool:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return _is_images(first) or isinstance(value, Mapping)


def _describe(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _read_batch(item: Any) -> _Batch:
    images, labels, others = item, None, {}
    if isinstance(item, Mapping):
        others = {str(key): value for key, value in item.items() if key not in ("pixel_values", "labels")}
        images, labels = item.get("pixel_values"), item.get("labels")
    elif isinstance(item, tuple | list) and len(item) in (1, 2):
        images, labels = item[0], item[1] if len(item) == 2 else None
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(
            f"verify: a batch has {_describe(images)} for images; expected a floating-point tensor (N, C, H, W), N at "
            f"least 1, preprocessed for the model. The data may be {_FORMS}."
        )
    return _Batch(images, None if labels is None else _read_labels(labels, len(images)), others)


def _read_labels(labels: Any, count: int) -> Tensor:
    with suppress(TypeError, ValueError, RuntimeError):  # then the error below says what came
        labels = torch.as_tensor(labels).cpu()
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.dtype not in _WHOLE:
        raise ValueError(
            f"verify: a batch of {count} images has {_describe(labels)} for labels; expected one whole number per "
            f"image, its class: shape ({count},)."
        )
    return labels.long()


def _dtypes(model: nn.Module) -> list[torch.dtype]:
    return [p.dtype for p in model.parameters() if p.is_floating_point()] or [torch.float32]


def _devices(model: nn.Module) -> list[torch.device]:
    tensors = [*model.parameters(), *model.buffers()]
    return list(dict.fromkeys(tensor.device for tensor in tensors)) or [torch.device("cpu")]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        model.train(flags[0][1])  # some models do more in train() than set flags
        for module, training in flags:
            module.training = training


@contextmanager
def _progress_bar(wanted: bool, total: int) -> Iterator[Callable[[], None]]:
    if not wanted or sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("comparing", total=None if total == sys.maxsize else total)
        yield lambda: bar.advance(task)


def _run(model: nn.Module, batch: _Batch, seed: int) -> tuple[Any, float]:
    """The model's output for a batch, and the seconds it took. The global random state stays as it was."""
    devices, dtype = _devices(model), _dtypes(model)[0]
    images, others = _moved(batch.images, devices[0], dtype), _moved(batch.others, devices[0], dtype)
    name = getattr(model, "main_input_name", None)
    takes_name = isinstance(name, str) and name in inspect.signature(model.forward).parameters
    args, named = ((), {str(name): images}) if takes_name else ((images,), {})
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reach devices that were not forked
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        output = model(*args, **named, **others)
        for device in cuda:
            torch.cuda.synchronize(device)
        return output, time.perf_counter() - start


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy (a model may work in place on what it gets) on the device, floating-point tensors in the dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, Mapping):
        return {key: _moved(entry, device, dtype) for key, entry in value.items()}
    return [_moved(entry, device, dtype) for entry in value] if isinstance(value, list) else value


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


def _float64(x: Tensor) -> Tensor:
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no float64


class _Comparison:
    """The sums over all batches that the report is made of."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}  # squared error, squared norm, largest error, numbers not finite
        self.not_compared: dict[str, None] = {}
        self.sizes: list[int] = []
        self.seconds: list[tuple[float, float]] = []
        self.same = self.with_logits = self.labelled = 0
        self.right = [[0, 0], [0, 0]]  # of original, converted: top-1, top-5

    def add(self, batch: _Batch, original: tuple[Any, float], converted: tuple[Any, float]) -> None:
        self.sizes.append(len(batch.images))
        self.seconds.append((original[1], converted[1]))
        pairs = self._pairs(dict(_leaves(original[0])), dict(_leaves(converted[0])))
        for name, (a, b) in pairs.items():
            self._add_numbers(name, _float64(a), _float64(b))
        logits = self._logits(pairs, batch)
        if logits is not None:
            self._add_classes(*logits, batch.labels)

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
                    f"verify: {name} is {_describe(a)} from the original and {_describe(b)} from the converted model; "
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

    def _logits(self, pairs: dict[str, tuple[Tensor, Tensor]], batch: _Batch) -> tuple[Tensor, Tensor] | None:
        flat = [name for name, (a, _) in pairs.items() if a.ndim == 2 and len(a) == len(batch.images)]
        if "logits" in pairs:
            flat = [name for name in flat if name == "logits"]
        if len(flat) == 1 and flat[0] != "pooler_output":  # Hugging Face's features before the classifier
            return pairs[flat[0]]
        if batch.labels is not None:
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
        if not self.sizes:
            raise ValueError(f"verify: data is empty; expected {_FORMS}. Was an iterator already used up?")
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
