"""report.html: one self-contained page about a conversion. It asks for nothing from anywhere."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from sw_transplant.check.certificate import Certificate
from sw_transplant.check.report import VerifyReport
from sw_transplant.check.rounding import LayerRounding
from sw_transplant.find.search import inspect_model
from sw_transplant.find.summary import summary
from sw_transplant.geometry import Size
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.report.fields import plot_receptive_field
from sw_transplant.report.figures import to_png
from sw_transplant.report.kernels import plot_kernel
from sw_transplant.report.layers import (
    plot_calibration,
    plot_rounding,
    plot_sparsity,
    plot_utilisation,
    response_errors,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNELS_SHOWN = 3
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets the page do: show what it holds."""
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; border-bottom: 1px solid #999; margin-top: 2.2rem; }
pre { font: 12px/1.35 ui-monospace, monospace; background: #f4f4f4; padding: .8rem; overflow-x: auto; }
.verdict { font-size: 1.1rem; font-weight: bold; border: 2px solid #111; padding: .5rem .8rem; }
img { max-width: 100%; height: auto; border: 1px solid #ccc; } figure { margin: 1rem 0; }
figcaption { color: #444; } nav a { margin-right: 1rem; } summary { cursor: pointer; }
"""


def write_report(
    path: str | os.PathLike[str],
    title: str,
    original: nn.Module,
    converted: nn.Module,
    report: VerifyReport,
    layers: Iterable[LayerRounding],
    certificate: Certificate,
    fields: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the page: verdict, inspection, comparison, layers, pictures, certificate.

    Args:
        path: of the HTML file; one that is there is replaced.
        title: what the model is called.
        original, converted: the two models.
        report: their comparison.
        layers: the rounding of each layer, with the maps that it got.
        certificate: of the same comparison.
        fields: effective receptive fields by the name of a network, to be shown; None for none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = tuple(layers)
    sections = [
        ("Inspection", "What was looked at in the original, what is converted, and what is left and why.",
         _text(str(inspect_model(original)))),
        ("Comparison", "Original and converted model on the same images.",
         _text(str(report)) + "".join(f"<p>{html.escape(reason)}</p>" for reason in report.reasons)),
        ("Layers", "The converted layers, and how each ran.", _text(summary(converted))),
        ("Pictures", "", "".join(_picture(*picture) for picture in _pictures(converted, layers, fields))),
        ("Certificate", "What the file certificate.json holds.",
         f"<details><summary>Show</summary>{_text(json.dumps(certificate.values, indent=1))}</details>"),
    ]  # fmt: skip
    verdict = "OK" if certificate.ok else "FAILED"
    what = "the same function, within its bounds" if certificate.ok else "not the same function, or beyond a bound"
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name, _, _ in sections)
    body = "".join(
        f'<section id="{name.lower()}"><h2>{name}</h2><p>{html.escape(text)}</p>{content}</section>'
        for name, text, content in sections
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="verdict">{verdict}: {what}</p><nav>{links}</nav>{body}</body></html>\n'
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _text(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _picture(name: str, text: str, figure: Figure) -> str:
    content = base64.b64encode(to_png(figure)).decode()
    caption = html.escape(text)
    return (
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{content}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _pictures(
    converted: nn.Module, layers: tuple[LayerRounding, ...], fields: Mapping[str, Tensor] | None
) -> list[tuple[str, str, Figure]]:
    modules = {path: module for path, module in converted.named_modules() if isinstance(module, ShiftwiseConv2d)}
    sizes: dict[str, int | Size] = {layer.path: (layer.shape[2], layer.shape[3]) for layer in layers}
    pictures = [
        (
            "rounding",
            "The largest rounding error of each layer, in percent of the bound that is proven for it.",
            plot_rounding(layers),
        ),
        ("tiles in use", "Tiles that are neither masked nor zero.", plot_sparsity(converted)),
    ]
    if sizes:
        text = "Outputs of the small convolutions that reach an output of the layer, on the maps that the layers got."
        pictures.append(("utilisation", text, plot_utilisation(converted, sizes)))
    if response_errors(converted):
        text = (
            "Squared error of the calibrated layers' responses on the calibration images, relative to the original's."
        )
        pictures.append(("calibration", text, plot_calibration(converted)))
    if fields:
        text = "How much every pixel contributes to the centre of the last map. A square holds a share t of it."
        pictures.append(("receptive field", text, plot_receptive_field(fields)))
    spread = list(modules)[:: max(1, -(-len(modules) // KERNELS_SHOWN))]
    for path in spread[:KERNELS_SHOWN]:
        text = f"{path or '(the model)'}: the kernel of its first channel. Mid-grey is zero, lines are tiles."
        pictures.append((f"kernel of {path}", text, plot_kernel(modules[path])))
    return pictures
