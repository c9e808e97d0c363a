"""What the rest of the package calls for models of transformers (:class:`sw_transplant.surgery.hosts.Host`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from sw_transplant.hf.notes import forget_layers, note_layers, shiftwise_layers, strange_modules
from sw_transplant.hf.quantizer import ShiftwiseQuantizer
from sw_transplant.hf.shiftwise_config import ShiftwiseConfig
from sw_transplant.hf.unasked import given_quantizer
from sw_transplant.surgery.description import describe
from sw_transplant.surgery.hosts import add_host, is_host_folder


def attach(model: nn.Module) -> None:
    """Lets a model, and every part that is a model of its own, know at once which layers in it are Shiftwise.

    ``convert``, ``merge``, ``restore`` and ``load`` do this for the model that they are given. Where a part was
    converted (``model.backbone = convert(model.backbone)``), which does not know the whole, ``save_pretrained`` of the
    whole finds out by itself; call this if its configuration shall say so before.

    Args:
        model: a model of transformers, or one with such models in it; its layers are not changed.

    Raises:
        ValueError: a model that is quantized otherwise has such layers in it.
    """
    parts = list(_models(model))
    for path, part in parts:
        if next(shiftwise_layers(part), None) is not None:
            _refuse_other_quantizer(path, part)
    for _, part in parts:
        before = given_quantizer(part)
        if next(shiftwise_layers(part), None) is not None or strange_modules(part):
            part.__dict__["hf_quantizer"] = ShiftwiseQuantizer(ShiftwiseConfig(layers=[]))
        elif before is not None:
            del part.__dict__["hf_quantizer"]
            forget_layers(part)
    outermost = [(path, part) for path, part in parts if not any(_is_below(path, other) for other, _ in parts)]
    for _, part in outermost:
        if (noted := given_quantizer(part)) is not None:
            with suppress(ValueError):  # a layer that cannot be described: save_pretrained will say so
                note_layers(part)
                noted.quantization_config = getattr(part.config, "quantization_config", None) or ShiftwiseConfig()


class _Transformers:
    """The host."""

    def check(self, model: nn.Module) -> None:
        for path, part in _models(model):
            _refuse_other_quantizer(path, part)

    def follow(self, model: nn.Module) -> None:
        attach(model)

    def saves(self, model: nn.Module) -> bool:
        return isinstance(model, PreTrainedModel)

    def save(self, model: nn.Module, folder: Path) -> None:
        attach(model)
        with _without_bars():
            model.save_pretrained(folder)  # type: ignore[operator]  # it is a PreTrainedModel

    def read(self, base_model: nn.Module, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]] | None:
        if not is_host_folder(folder):
            return None
        kind: Any = type(base_model)
        try:
            with _without_bars():
                model, report = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        except Exception as error:  # files from anywhere can be wrong in any way
            raise ValueError(f"{folder}: cannot be read as {kind.__name__} ({error})") from error
        lacks = {what: sorted(report[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(lacks.values()):
            problems = "; ".join(f"{what}: {names[:3]}" for what, names in lacks.items() if names)
            raise ValueError(f"{folder}: does not fit {kind.__name__}: {problems}; expected the class that was saved")
        return [layer.to_dict() for layer in describe(model)], model.state_dict()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers: ``save`` and ``load`` are silent for other models."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    return ((path, part) for path, part in model.named_modules() if isinstance(part, PreTrainedModel))


def _refuse_other_quantizer(path: str, model: PreTrainedModel) -> None:
    other = vars(model).get("hf_quantizer")
    if other is not None and given_quantizer(model) is None:
        raise ValueError(
            f"{path or 'model'}: it is quantized with {other.quantization_config.quant_method}, whose folders "
            "cannot hold Shiftwise layers; convert the model before it is quantized"
        )


def _is_below(path: str, other: str) -> bool:
    return path != other and path.startswith(f"{other}." if other else "")


add_host("transformers", _Transformers())
