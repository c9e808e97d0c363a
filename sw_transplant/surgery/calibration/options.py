"""What may be said of a calibration beside the images, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sw_transplant.surgery.calibration.refit import Refitted
from sw_transplant.tables import render_table

FitTo = Literal["responses", "kernels"]


@dataclass(frozen=True)
class LayerReport:
    """What the calibration of one layer reached.

    Attributes:
        path: of the layer.
        positions: outputs of a channel on all calibration images.
        orders_before, orders_after: squared error of the fit (with its ridge) of the active and passive channels alike,
            relative to the energy of the responses, with the orders first drawn and with those chosen.
        strips: the least that any strips of this width reach: no bank, no orders, free taps.
        ghosts: how many channels bypass the module.
        response_error: squared error of the whole module's responses, relative to the energy of the original's.
        refitted: linear layers behind it, and those left with a reason.
    """

    path: str
    positions: int
    orders_before: float
    orders_after: float
    strips: float
    ghosts: int
    response_error: float
    refitted: tuple[Refitted, ...] = ()


@dataclass
class CalibrationReport:
    """What a calibration reached; as text, a table.

    Attributes:
        layers: in the order of execution.
        agreement: on how many of how many held-out images the network chose the class that the original chose; None
            where none were held out, or where there is no class.
        notes: what could not be done, and why.
    """

    layers: list[LayerReport] = field(default_factory=list)
    agreement: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def refitted(self) -> list[Refitted]:
        """The linear layers that were refitted, of all layers."""
        return [each for layer in self.layers for each in layer.refitted if not each.reason]

    def __str__(self) -> str:
        rows = [
            [
                layer.path or "(the model)",
                str(layer.positions),
                f"{layer.strips:.2%}",
                f"{layer.orders_before:.2%}",
                f"{layer.orders_after:.2%}",
                str(layer.ghosts),
                f"{layer.response_error:.2%}",
                ", ".join(map(str, layer.refitted)),
            ]
            for layer in self.layers
        ]
        headers = ["layer", "positions", "free strips", "drawn orders", "chosen orders", "ghosts", "whole module"]
        headers.append("refitted")
        lines = [render_table("Calibration: squared errors relative to the original's responses", headers, rows)]
        if self.agreement is not None:
            lines.append(f"The original's class on {self.agreement[0]} of {self.agreement[1]} held-out images.")
        return "\n".join(lines + self.notes)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration images and how they are used: what :func:`convert` takes as ``calibration``, images alone will do.

    Args:
        images: a tensor (N, C, H, W), preprocessed as the model takes it; an iterable that can be gone through again (a
            list, a DataLoader) of such tensors, of pairs (images, labels) or of dicts of the forward's arguments; a
            function that runs the model it is given, as often as it likes. Labels are not used. ``"synthetic"`` makes
            images from nothing but the model (:mod:`synthetic`).
        fit: ``"responses"``, or ``"kernels"``: least squares in kernel space as without images, which then only set the
            statistics of the BatchNorms.
        ridge: weight of the distance to the original kernels, relative to the mean square of the layer's input.
        candidates, swaps: how many orders are drawn for each channel, and how many exchanges of two places are tried.
            1 and 0 keep the orders that the module draws itself.
        mix: how far the channels of a layer make up for each other's errors, 0 to 1; 0 fits each by itself.
        refit: refit the linear layers behind each module, too. That changes weights beside the modules.
        held_out: share of the images (every so manieth batch, where batches come) that is left for counting on how many
            the network chooses the class that the original chooses.
        batch_size: of a single tensor.
        input_size: (C, H, W) of synthetic images; None for what the model says of itself.
        count: how many synthetic images.
        progress: show a bar on stderr where that is a terminal.

    Attributes:
        report: what was reached, filled by :func:`convert`.
    """

    images: Any = field(repr=False)
    fit: FitTo = "responses"
    ridge: float = 1e-2
    candidates: int = 2
    swaps: int = 150
    mix: float = 0.7
    refit: bool = False
    held_out: float = 0.1
    batch_size: int = 16
    input_size: int | tuple[int, ...] | None = None
    count: int = 64
    progress: bool = True
    report: CalibrationReport = field(default_factory=CalibrationReport, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.fit not in ("responses", "kernels"):
            raise ValueError(f"Calibration.fit: got {self.fit!r}, expected 'responses' or 'kernels'")
        if not self.ridge > 0:
            raise ValueError(f"Calibration.ridge: got {self.ridge!r}, expected a number above 0")
        for name, least in (("candidates", 1), ("swaps", 0), ("batch_size", 1), ("count", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Calibration.{name}: got {value!r}, expected an integer of at least {least}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"Calibration.mix: got {self.mix!r}, expected a number from 0 to 1")
