"""Whether two models compute the same function: every output compared number by number, and the classes they choose."""

from __future__ import annotations

import copy
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sw_transplant.batches import describe, is_images
from sw_transplant.check.certificate import certificate as make_certificate
from sw_transplant.check.certificate import hash_tensors, hash_weights
from sw_transplant.check.comparison import Comparison, leaves, logits_name
from sw_transplant.check.model_input import ModelInput
from sw_transplant.check.reference import Reference
from sw_transplant.check.report import SAME_FUNCTION, Count, OutputError, VerificationError, VerifyReport
from sw_transplant.check.rounding import LayerRounding, measure_layers
from sw_transplant.config import SWConfig

__all__ = ["BOUNDS", "TF32_BOUND", "Count", "OutputError", "VerificationError", "VerifyReport", "bound_for", "verify"]

# The relative RMS error that an exact conversion stays below, by the type of number the model computes in.
BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
TF32_BOUND = 2e-3  # float32 in memory, multiplied with the 10 bits of mantissa that float16 has


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
    certificate: str | os.PathLike[str] | None = None,
    config: SWConfig | None = None,
) -> VerifyReport:
    """Run two models on the same images, in eval mode, and compare everything they return.

    Both models see the same random state in every batch, and get their training flags back, also after an error.
    Norms are added up in float64 over all batches. The speeds, for information, leave out the first of several batches.

    In float64 and float32 the two models are compared with each other. In 16 bits (and TF32) a deep network is several
    percent from itself in float64, and so is whatever computes the same function in another order. There, copies of
    both run in float64 as well (in float32 where float64 does not fit): the converted model may be twice as far from
    the original's copy as the original is, plus ``bounds``; and its own copy, in which nothing is rounded, has to agree
    as it would in float32. This last part is left out where the weights themselves were rounded on the way (merged in
    16 bits, or another dtype than the original's).

    Args:
        original: the reference.
        converted: the model under test; it must return the same structure of outputs.
        data: None for two batches of seeded normal noise of the size the original takes (see ``ModelInput.of``); else
            a tensor (N, C, H, W); a pair (images (N, C, H, W), labels (N,)); a dict with ``pixel_values``, optional
            ``labels`` (N,) and whatever else the forward takes; or an iterable, such as a DataLoader or what
            ``load_images`` returns, of any of these. Floating-point tensors are cast to each model's dtype.
        bounds: the relative RMS error allowed between the two models, which are then compared with each other alone;
            None takes :func:`bound_for` the coarsest dtype among both models' floating-point parameters (and
            autocast's, inside it) on their device.
        batch_size: how many images of one tensor, pair or of the noise make a batch.
        device, dtype: where given, COPIES of both models are moved there and run; the models stay as they are.
        max_batches: stop after this many batches.
        input_size: S, (H, W) or (C, H, W) of the noise, where ``data`` is None.
        seed: of the noise, and of whatever is random inside the models.
        progress: show a progress bar on stderr where that is a terminal.
        certificate: file to write what was found to (docs/certificate.md), usually ``certificate.json`` in the folder
            that ``save`` wrote, whose files it then covers. Every converted layer is then compared with exact
            arithmetic, too, on the first batch.
        config: of the conversion, for the certificate.

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
    noise = data is None
    if data is None:
        data = _noise(original, input_size, batch_size, seed)
    models = (original, converted)
    if device is not None or dtype is not None:
        original, converted = copy.deepcopy((original, converted))
        for model in (original, converted):
            model.to(device=device, dtype=dtype)
    devices = [_devices(original)[0], _devices(converted)[0]]
    dtypes = _dtypes(original) + _dtypes(converted)
    dtypes += [torch.get_autocast_dtype(d.type) for d in devices if torch.is_autocast_enabled(d.type)]
    coarsest = max(dtypes, key=lambda kind: torch.finfo(kind).eps)
    bound = max(bound_for(coarsest, d) for d in devices) if bounds is None else bounds

    comparison = Comparison()
    coarse = bounds is None and bound > SAME_FUNCTION
    reference = Reference(original, converted) if coarse else None
    batches = _split(data, batch_size)
    hashes: list[str] = []  # of the batches
    shape: tuple[int, ...] = ()  # of the first
    layers: tuple[LayerRounding, ...] = ()
    total = min(length_hint(batches, sys.maxsize), max_batches or sys.maxsize)
    # Not inference_mode: what a model caches under it, an assembled kernel for instance, could not be trained through.
    with torch.no_grad(), _evaluating(original), _evaluating(converted), _progress_bar(progress, total) as advance:
        for index, batch in enumerate(map(_read_batch, batches), start=1):
            runs = _run(original, batch, seed), _run(converted, batch, seed)
            wide = None if reference is None else reference.outputs(_runner(batch, seed))
            comparison.add(batch.images, batch.labels, *runs, wide)
            if certificate is not None:
                hashes.append(hash_tensors([batch.images]))
                layers = layers if index > 1 else measure_layers(converted, _runner(batch, seed))
                shape = shape or tuple(batch.images.shape)
            advance()
            if index == max_batches:
                break
    if not comparison.sizes:
        raise ValueError(f"verify: data is empty; expected {_DATA_FORMS}. Was an iterator already used up?")
    dtype_name, device_name = str(coarsest).removeprefix("torch."), str(devices[0])
    wide_name = None if reference is None or reference.dtype is None else str(reference.dtype).removeprefix("torch.")
    note = "" if reference is None else reference.note
    report = comparison.report(bound, dtype_name, device_name, wide_name, note)
    if certificate is not None:
        inputs: dict[str, Any] = {
            "kind": "noise" if noise else "images",
            "images": report.images,
            "seed": seed,
            "shape": shape,
        }
        inputs["batches"] = hashes
        weights = hash_weights(models[0]), hash_weights(models[1])
        make_certificate(original, weights, report, layers, inputs, config).write(certificate)
    return report


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


_DATA_FORMS = "images (N, C, H, W), a pair (images, labels), a dict with 'pixel_values', or an iterable of these"
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _split(data: Any, batch_size: int) -> Iterable[Any]:
    """The batches of the data, not yet looked into; a tensor or a pair of tensors is cut into several."""
    if isinstance(data, Tensor) and data.ndim:
        return data.split(batch_size)
    if isinstance(data, Tensor | Mapping):
        return [data]
    if isinstance(data, tuple | list) and len(data) == 2 and _has_four_axes(data[0]) and not _is_batch(data[1]):
        images, labels, _ = _read_batch(data)  # before cutting, which would hide that there are more labels than images
        cut = images.split(batch_size)
        return cut if labels is None else list(zip(cut, labels.split(batch_size), strict=True))
    if isinstance(data, Iterable):
        return data
    raise ValueError(f"verify: data is a {type(data).__name__}; expected {_DATA_FORMS}.")


def _has_four_axes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _is_batch(value: Any) -> bool:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return _has_four_axes(first) or isinstance(value, Mapping)


def _read_batch(item: Any) -> _Batch:
    images, labels, others = item, None, {}
    if isinstance(item, Mapping):
        others = {str(key): value for key, value in item.items() if key not in ("pixel_values", "labels")}
        images, labels = item.get("pixel_values"), item.get("labels")
    elif isinstance(item, tuple | list) and len(item) in (1, 2):
        images, labels = item[0], item[1] if len(item) == 2 else None
    if not is_images(images) or not len(images):
        raise ValueError(
            f"verify: a batch has {describe(images)} for images; expected a floating-point tensor (N, C, H, W), N at "
            f"least 1, preprocessed for the model. The data may be {_DATA_FORMS}."
        )
    return _Batch(images, None if labels is None else _read_labels(labels, len(images)), others)


def _read_labels(labels: Any, count: int) -> Tensor:
    with suppress(TypeError, ValueError, RuntimeError):  # then the error below says what came
        labels = torch.as_tensor(labels).cpu()
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.dtype not in _WHOLE:
        raise ValueError(
            f"verify: a batch of {count} images has {describe(labels)} for labels; expected one whole number per "
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


def numbers_per_class(model: nn.Module, images: Tensor) -> int | None:
    """How many classes a model tells apart, seen on images; None where no output of it is one number per class."""
    with torch.no_grad(), _evaluating(model):
        outputs = dict(leaves(_run(model, _Batch(images, None, {}), 0)[0]))
    name = logits_name(outputs, len(images))
    return None if name is None else int(outputs[name].shape[1])


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


def _runner(batch: _Batch, seed: int) -> Callable[[nn.Module], Any]:
    return lambda model: _run(model, batch, seed)[0]


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy (a model may work in place on what it gets) on the device, floating-point tensors in the dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, Mapping):
        return {key: _moved(entry, device, dtype) for key, entry in value.items()}
    return [_moved(entry, device, dtype) for entry in value] if isinstance(value, list) else value
