"""Time of one large-kernel layer: PyTorch's own convolutions against every execution form of this package.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json
    python benchmarks/kernels.py --layers slak figure4.strips --dtypes tf32 fp16 --forward-only

The layers are those of SLaK-T, SW-T, RepLKNet-31B, UniRepLKNet-T and ConvNeXt-T at 224 x 224, and those of SLaK's
Figure 4: depthwise convolutions of one map, added up. Ours is what `convert` makes of them. All candidates of a row run
in turns in one process. Errors are against float64; a candidate that is wrong is not timed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from common import (
    FORMATS,
    Clock,
    Peers,
    copy_rate,
    fastest,
    median,
    precision,
    product_rate,
    speedup,
    unsupported,
    what_was_timed,
)
from networks import GRADIENTS, Judge, decisions, refuse_other_form, with_form
from report import (
    Report,
    cudnn_option,
    dtypes_option,
    environment,
    formats_option,
    forms_option,
    parser,
    positive,
    use_device,
)
from torch import Tensor, nn

from sw_transplant import convert
from sw_transplant.forms import FORMS

NATIVE = {"native": "contiguous", "native cl": "channels_last"}
FORWARD, BACKWARD = "forward", "forward+backward"


class Layer(NamedTuple):
    """Depthwise kernels ``(height, width)`` on a map ``(batch, channels, side, side)``, padded to keep its size.

    Of their weights, the share ``sparsity`` is zero.
    """

    batch: int
    channels: int
    side: int
    kernels: tuple[tuple[int, int], ...]
    sparsity: float = 0.0

    def __str__(self) -> str:
        zeros = f", {self.sparsity:.0%} zeros" if self.sparsity else ""
        return " + ".join(f"{height}x{width}" for height, width in self.kernels) + zeros


def _strips(long: int, short: int) -> tuple[tuple[int, int], ...]:
    return (long, short), (short, long)


LAYERS = {
    "slak.0": Layer(128, 124, 56, _strips(51, 5)),
    "slak.1": Layer(128, 249, 28, _strips(49, 5)),
    "slak.2": Layer(128, 499, 14, _strips(47, 5)),
    "slak.3": Layer(128, 998, 7, _strips(13, 5)),
    "sw.0": Layer(128, 62, 56, _strips(51, 3)),  # 77% of the channels: the others are ghosts
    "sw.1": Layer(128, 124, 28, _strips(49, 3)),
    "sw.2": Layer(128, 247, 14, _strips(47, 3)),
    "sw.3": Layer(128, 493, 7, _strips(13, 3)),
    "replknet.0": Layer(64, 128, 56, ((31, 31),)),
    "replknet.1": Layer(64, 256, 28, ((29, 29),)),
    "replknet.2": Layer(64, 512, 14, ((27, 27),)),
    "replknet.3": Layer(64, 1024, 7, ((13, 13),)),
    "unireplknet.1": Layer(128, 160, 28, ((13, 13),)),
    "unireplknet.2": Layer(128, 320, 14, ((13, 13),)),
    "unireplknet.3": Layer(128, 640, 7, ((13, 13),)),
    "convnext.0": Layer(128, 96, 56, ((7, 7),)),
    "convnext.1": Layer(128, 192, 28, ((7, 7),)),
    "convnext.2": Layer(128, 384, 14, ((7, 7),)),
    "convnext.3": Layer(128, 768, 7, ((7, 7),)),
    **{f"figure4.strips.{side}": Layer(64, 384, side, _strips(51, 5)) for side in (16, 32, 64, 128)},
    **{f"figure4.square.{side}": Layer(64, 384, side, ((51, 51),)) for side in (16, 32, 64, 128)},
    **{f"figure4.sparse.{side}": Layer(64, 384, side, ((51, 51),), 0.4) for side in (16, 32, 64, 128)},
}


class DepthwiseSum(nn.Module):
    """Depthwise convolutions of one map, added up."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(layer.channels, layer.channels, size, padding="same", groups=layer.channels, bias=False)
            for size in layer.kernels
        )
        for conv, (height, width) in zip(self.convs, layer.kernels, strict=True):
            nn.init.normal_(conv.weight, std=(height * width) ** -0.5)
            with torch.no_grad():
                conv.weight.mul_(torch.rand_like(conv.weight) >= layer.sparsity)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        first, *others = self.convs
        out = first(x)
        for conv in others:
            out = out + conv(x)
        return out


def operations(layer: Layer, batch: int) -> int:
    """Floating-point operations of a forward pass; taps that meet the padding do not count."""
    return 2 * batch * layer.channels * sum(_taps(layer.side, h) * _taps(layer.side, w) for h, w in layer.kernels)


def _taps(side: int, kernel: int) -> int:
    """Pairs of a position and a tap that lies within the map, along one axis."""
    half = kernel // 2
    return sum(min(i + half, side - 1) - max(i - half, 0) + 1 for i in range(side))


def floors(layer: Layer, batch: int, backward: bool, itemsize: int, copy: float, product: float) -> tuple[float, float]:
    """Milliseconds that the bytes and the operations take at the rates of this device.

    Forward: the map is read, and one written. Backward: gradient and map are read, a gradient is written, and there are
    twice the operations.
    """
    maps, passes = (5, 3) if backward else (2, 1)
    nbytes = maps * batch * layer.channels * layer.side**2 * itemsize
    return 1e3 * nbytes / copy, 1e3 * passes * operations(layer, batch) / product


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """As in inference."""
    with torch.inference_mode():
        return module(x)


def step(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the map, and gradients of the parameters."""
    y = module(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad))


def outcome(module: nn.Module, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    """What is compared: output and gradient of the map for the first and the last image of the batch.

    Tiles and kernels hold the same gradients in other places: of these, for these two images, it is the norm.
    """
    ends = [0, -1]
    if grad is None:
        return [forward(module, x)[ends]]
    _, _, *grads = step(module, x.detach()[ends].requires_grad_(), grad[ends])
    y, grad_x, *_ = step(module, x, grad)  # last, so that the module's decision is that for the whole batch
    return [y[ends], grad_x[ends], torch.stack([g.double().norm() for g in grads]).norm()]


class Bench:
    """Measures rows: holds the clock, the rates of the device and the options."""

    def __init__(self, device: torch.device, forms: Sequence[str], repeats: int, seconds: float) -> None:
        self.device, self.forms, self.repeats, self.seconds = device, forms, repeats, seconds
        self.clock = Clock(device, cold=True)
        self.copy = copy_rate(self.clock, min(repeats, 10))
        self.product: dict[str, float] = {}

    def rate(self, name: str, dtype: torch.dtype) -> float:
        """Of matrix products in this precision, measured once."""
        if name not in self.product:
            self.product[name] = product_rate(self.clock, min(self.repeats, 10), dtype)
        return self.product[name]

    def row(self, layer: Layer, batch: int, name: str, direction: str, layout: str) -> list[dict]:
        """One row of the table: a layer in one precision."""
        if (reason := unsupported(name, self.device)) is not None:
            return [{"reasons": {"row": reason}}]
        with precision(name) as dtype:
            return [self._row(layer, batch, name, dtype, direction == BACKWARD, layout)]

    def _row(self, layer: Layer, batch: int, name: str, dtype: torch.dtype, backward: bool, layout: str) -> dict:
        torch.manual_seed(0)
        native = DepthwiseSum(layer).to(self.device, dtype)
        shape = (batch, layer.channels, layer.side, layer.side)
        x, grad = torch.randn(2, *shape, device=self.device).to(dtype).unbind()
        grad = grad if backward else None
        double = copy.deepcopy(native).double()
        ends = [0, -1]
        expected = outcome(double, _leaf(x[ends].double(), backward), None if grad is None else grad[ends].double())
        judge = Judge(expected, GRADIENTS if backward else 1)

        peers = Peers()
        for candidate, own in NATIVE.items():
            build = partial(lambda own: copy.deepcopy(native).to(memory_format=FORMATS[own]), own)
            self._enter(peers, judge, candidate, build, x, grad, own, name)
        chosen: dict[str, str] = {}
        for form in self.forms:
            build = partial(lambda form: with_form(convert(native), form), form)
            module = self._enter(peers, judge, form, build, x, grad, layout, name)
            if module is not None:
                refuse_other_form(peers, form, module, form)
                chosen[form] = ", ".join(decisions(module).values())
        samples = peers.time(self.clock, self.repeats, self.seconds)

        by_bytes, by_operations = floors(layer, batch, backward, x.itemsize, self.copy, self.rate(name, dtype))
        floor, rival = max(by_bytes, by_operations), fastest(samples, list(NATIVE))
        best = fastest(samples, [form for form in self.forms if form != "auto"]) or fastest(samples, self.forms)
        ms = {candidate: median(samples, candidate) for candidate in (*NATIVE, *self.forms)}
        return {
            **ms,
            "auto runs": chosen["auto"].partition(":")[0] or None if "auto" in chosen else None,
            "fastest": best,
            "timed": what_was_timed(peers.timed),
            "speedup": speedup(samples, rival, best),
            "auto speedup": speedup(samples, rival, "auto"),
            "floor": floor,
            "of floor": None if best is None else floor / ms[best],
            "native error": judge.worst(list(NATIVE)),
            "error": judge.worst(self.forms),
            "copy floor": by_bytes,
            "operations floor": by_operations,
            "decisions": chosen,
            "timed by candidate": peers.timed,
            "errors": judge.errors,
            "rounds": {candidate: len(times) for candidate, times in samples.items()},
            "reasons": peers.reasons,
        }

    def _enter(
        self,
        peers: Peers,
        judge: Judge,
        candidate: str,
        build: Callable[[], nn.Module],
        x: Tensor,
        grad: Tensor | None,
        layout: str,
        name: str,
    ) -> nn.Module | None:
        """Builds a candidate, compares its outcome, and lets it run for time if that is right; None if it failed."""
        module = peers.attempt(candidate, build)
        if module is None:
            return None
        to = {"memory_format": FORMATS[layout]}
        x, grad = _leaf(x.contiguous(**to), grad is not None), None if grad is None else grad.contiguous(**to)
        got = peers.attempt(candidate, lambda: outcome(module, x, grad))
        if got is None:
            return None
        peers.runs[candidate] = partial(forward, module, x) if grad is None else partial(step, module, x, grad)
        judge.check(peers, candidate, got, name, native=candidate if candidate in NATIVE else None)
        return module


def _leaf(x: Tensor, requires_grad: bool) -> Tensor:
    return x.detach().requires_grad_(requires_grad)


def selected(names: Sequence[str]) -> list[str]:
    """The layers of these names, or whose names begin with them and a dot.

    Raises:
        ValueError: no layer has such a name.
    """
    for name in names:
        if not any(f"{layer}.".startswith(f"{name}.") for layer in LAYERS):
            raise ValueError(f"--layers {name}: no such layer; expected some of {', '.join(LAYERS)}")
    return [layer for layer in LAYERS if any(f"{layer}.".startswith(f"{name}.") for name in names)]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options_parser = parser(__doc__, repeats=(30, 5), seconds=2)
    options_parser.add_argument("--layers", nargs="+", default=list(LAYERS), help="names, or what they begin with")
    options_parser.add_argument("--batch", type=positive, help="images; by layer on a GPU, 1 on a CPU")
    cudnn_option(options_parser)
    dtypes_option(options_parser)
    forms_option(options_parser, [*FORMS, "auto"], [*FORMS, "auto"])
    formats_option(options_parser, ["contiguous"])
    passes = options_parser.add_mutually_exclusive_group()
    passes.add_argument("--forward-only", action="store_true", help="no row of forward and backward together")
    passes.add_argument("--backward", action="store_true", help="no row of the forward alone")
    options = options_parser.parse_args(arguments)
    try:
        layers = selected(options.layers)
    except ValueError as error:
        options_parser.error(str(error))
    device = use_device(options.device)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    directions = [FORWARD] * (not options.backward) + [BACKWARD] * (not options.forward_only)

    bench = Bench(device, options.forms, options.repeats, options.seconds)
    head = {
        "environment": environment("kernels.py", arguments, device),
        "copy_bytes_per_second": bench.copy,
        "operations_per_second": bench.product,
    }
    columns = {"layer": 18, "batch": 5, "channels": 8, "map": 7, "kernels": 11, "dtype": 5, "pass": 16, "format": 13}
    columns |= dict.fromkeys([*NATIVE, *options.forms], 9)
    columns |= dict.fromkeys(
        ["auto runs", "fastest", "timed", "speedup", "auto speedup", "floor", "of floor", "native error", "error"], 9
    )
    report = Report(columns, head, options.json, options.minutes)
    for name in layers:
        layer = LAYERS[name]
        batch = options.batch or (layer.batch if device.type == "cuda" else 1)
        for layout in options.formats:
            for dtype in options.dtypes:
                for direction in directions:
                    known = {
                        "layer": name,
                        "batch": batch,
                        "channels": layer.channels,
                        "map": f"{layer.side}x{layer.side}",
                        "kernels": str(layer),
                        "dtype": dtype,
                        "pass": direction,
                        "format": layout,
                    }
                    report.measure(known, partial(bench.row, layer, batch, dtype, direction, layout))
    return report.rows


if __name__ == "__main__":
    main()
