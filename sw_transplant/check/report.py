"""What a comparison of two models found, and the verdict on it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

FACTOR = 2.0
"""How many times the original's own rounding error a conversion may have, where numbers are too coarse for a bound."""
SAME_FUNCTION = 1e-5
"""Relative RMS error between two models in wide numbers, up to which they are the same function: that of float32."""


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

    The next three are relative RMS errors against the original in wide numbers (:attr:`VerifyReport.reference`), None
    without it: ``original_error`` and ``converted_error`` of the two models as they ran, which is what rounding makes
    of them, and ``function_error`` of the converted model in wide numbers, which is what is left without rounding.
    ``psnr`` is the peak signal-to-noise ratio in decibels of an output that is an image, infinite where both are equal.
    """

    name: str
    relative_rms: float
    max_abs: float
    not_finite: int
    original_error: float | None = None
    converted_error: float | None = None
    function_error: float | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class VerifyReport:
    """The result of :func:`verify`. ``print(report)`` shows it as tables.

    ``ok`` looks at the numbers alone: all of them finite, and

    - without a reference every relative RMS error between the two models within ``bound``;
    - with one, every ``converted_error`` within ``FACTOR`` times the ``original_error`` plus ``bound``, and every
      ``function_error`` within ``SAME_FUNCTION``.

    In a low precision two classes that nearly tie may swap: ``same_top1`` shows that, and it is no failure.
    ``same_top1`` (images that get the same class from both models) is None where there are no logits, ``top1_*`` and
    ``top5_*`` (images whose label is the most likely class, or among the five most likely) are None without labels.
    ``not_compared`` names the outputs that hold no floating-point numbers.
    ``reference`` is the dtype of the copies that the errors are measured against, None where the two models are
    compared with each other; ``reference_note`` says why there is none, or not the best one.
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
    reference: str | None = None
    reference_note: str = ""

    @property
    def ok(self) -> bool:
        """Whether every number of every output is finite and every error is within what is allowed."""
        return not self.failures

    def allowed(self, output: OutputError) -> float:
        """The largest error that the verdict lets pass: of ``converted_error`` with a reference, else of
        ``relative_rms``."""
        return self.bound + (FACTOR * output.original_error if output.original_error is not None else 0.0)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each output that fails; empty where the models agree."""
        return tuple(failure for out in self.outputs for failure in self._failures_of(out))

    def _failures_of(self, out: OutputError) -> list[str]:
        if out.not_finite:
            return [f"{out.name}: {out.not_finite} numbers are NaN or infinite; expected none."]
        if out.converted_error is None:
            if out.relative_rms <= self.bound:
                return []
            return [f"{out.name}: relative RMS error {out.relative_rms:.2e}; the bound is {self.bound:g}."]
        found = []
        if out.function_error is not None and not out.function_error <= SAME_FUNCTION:
            found.append(
                f"{out.name}: computed in {self.reference}, where nothing is rounded to {self.dtype}, the models "
                f"differ by {out.function_error:.2e}; the bound is {SAME_FUNCTION:g}."
            )
        if not out.converted_error <= self.allowed(out):
            found.append(
                f"{out.name}: the converted model in {self.dtype} is {out.converted_error:.2e} from {self.reference}, "
                f"the original {out.original_error:.2e}; the bound is {self._rule(out)}."
            )
        return found

    def _rule(self, out: OutputError) -> str:
        return f"{FACTOR:g} x {out.original_error:.2e} + {self.bound:g} = {self.allowed(out):.2e}"

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each output that says why it passes or fails."""
        return tuple(reason for out in self.outputs for reason in self._failures_of(out) or [self._why_it_passes(out)])

    def _why_it_passes(self, out: OutputError) -> str:
        if out.converted_error is None:
            return f"{out.name}: relative RMS error {out.relative_rms:.2e}, within {self.bound:g}."
        wide = ""
        if out.function_error is not None:
            wide = f"; in {self.reference} they differ by {out.function_error:.2e}, within {SAME_FUNCTION:g}"
        return (
            f"{out.name}: the converted model in {self.dtype} is {out.converted_error:.2e} from {self.reference}, "
            f"within {self._rule(out)}, where {out.original_error:.2e} is the original's{wide}."
        )

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
        return {"ok": self.ok, "failures": list(self.failures), "reasons": list(self.reasons), **plain}

    def __str__(self) -> str:
        from rich.box import MARKDOWN
        from rich.console import Console
        from rich.table import Table

        def table(*titles: str) -> Table:
            made = Table(box=MARKDOWN)
            for title in titles:
                made.add_column(title, overflow="fold", justify="left" if title == titles[0] else "right")
            return made

        def numbers(name: str) -> list[str]:
            values = [getattr(out, name) for out in self.outputs]
            return ["" if value is None else f"{value:.2e}" for value in values]

        pictures = any(out.psnr is not None for out in self.outputs)
        errors = table(
            "output",
            "relative RMS error",
            "largest absolute error",
            *(["PSNR"] if pictures else []),
            "NaN or infinite",
        )
        for out in self.outputs:
            psnr = [""] if out.psnr is None else ["equal" if math.isinf(out.psnr) else f"{out.psnr:.1f} dB"]
            shown = [f"{out.relative_rms:.2e}", f"{out.max_abs:.2e}", *(psnr if pictures else [])]
            errors.add_row(out.name, *shown, str(out.not_finite))
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
        if self.reference is None:
            console.print(f"relative RMS error allowed: {self.bound:g}")
        console.print(errors)
        if self.reference is not None:
            rounding = table(
                f"against the original in {self.reference}",
                f"original in {self.dtype}",
                f"converted in {self.dtype}",
                "allowed",
                f"converted in {self.reference}",
            )
            columns = zip(numbers("original_error"), numbers("converted_error"), numbers("function_error"), strict=True)
            for out, (original, converted, function) in zip(self.outputs, columns, strict=True):
                rounding.add_row(out.name, original, converted, f"{self.allowed(out):.2e}", function)
            console.print(rounding)
            console.print(
                f"allowed: {FACTOR:g} times the original's own error + {self.bound:g}, and {SAME_FUNCTION:g} for the "
                f"converted model in {self.reference}"
            )
        if self.reference_note:
            console.print(self.reference_note)
        if self.same_top1 is not None:
            console.print(f"same class from both models: {self.same_top1}")
        console.print(models)
        for line in self.failures:
            console.print(f"FAILED {line}")
        if self.not_compared:
            console.print(f"not compared (no floating-point numbers): {', '.join(self.not_compared)}")
        lines = (line.rstrip() for line in text.getvalue().strip().splitlines())
        return "\n".join(lines).replace("\n\n\n", "\n\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Count):
        return {"count": value.count, "of": value.of, "share": value.share}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
