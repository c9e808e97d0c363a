"""What a layer of a small network costs on a CPU before and after its conversion, in microseconds of an eval call.

    OMP_NUM_THREADS=1 python benchmarks/small_layers.py --json benchmarks/results/small_layers.json

The layers are those of MCUNet, ProxylessNAS, EdgeFace and CFSR whose kernels are large: channels, map, taps, stride. In
each round the original, a copy of it, the converted layer, and the same without its shortcut (the long way, through
the planner) run once, in an order that is drawn anew. A difference is the median over the rounds of that to the
original; that of the copy says what the clock can tell apart.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
from common import FORMATS
from report import Report, environment, formats_option, parser
from torch import nn

import sw_transplant as sw


class Layer(NamedTuple):
    """A depthwise convolution of a network."""

    network: str
    channels: int
    side: int
    taps: int
    stride: int = 1


LAYERS = [
    Layer("MCUNet", 24, 88, 7, 2),
    Layer("MCUNet", 80, 44, 7),
    Layer("MCUNet", 120, 22, 5),
    Layer("MCUNet", 240, 11, 7),
    Layer("MCUNet", 480, 6, 7),
    Layer("ProxylessNAS", 192, 56, 7, 2),
    Layer("ProxylessNAS", 192, 14, 7),
    Layer("ProxylessNAS", 576, 7, 7),
    Layer("EdgeFace", 88, 7, 7),
    Layer("EdgeFace", 160, 7, 7),
    Layer("EdgeFace", 168, 4, 9),
    Layer("CFSR", 48, 24, 9),
    Layer("CFSR", 48, 64, 9),
]


@torch.no_grad()
def measure(layer: Layer, layout: str, rounds: int) -> list[dict]:
    """The row of one layer."""
    to = {"memory_format": FORMATS[layout]}
    conv = nn.Conv2d(
        layer.channels, layer.channels, layer.taps, layer.stride, layer.taps // 2, groups=layer.channels
    ).eval()
    converted = sw.convert(conv, sw.SWConfig(min_kernel=5)).to(**to)
    long_way = copy.deepcopy(converted)
    long_way._takes_shortcuts = False
    original = conv.to(**to)
    calls = {"native": original, "again": copy.deepcopy(original), "long way": long_way, "converted": converted}
    x = torch.randn(1, layer.channels, layer.side, layer.side).contiguous(**to)
    for call in calls.values():
        for _ in range(5):
            call(x)
    if not torch.allclose(original(x), converted(x), rtol=1e-4, atol=1e-5):
        raise RuntimeError("the converted layer computes something else")
    order, draw = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            call = calls[name]
            begin = time.perf_counter()
            call(x)
            times[name].append(1e6 * (time.perf_counter() - begin))
    row: dict = {"native": statistics.median(times["native"])}
    for name in order:
        if name != "native":
            row[name] = statistics.median(b - a for a, b in zip(times["native"], times[name], strict=True))
    return [row]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options_parser = parser(__doc__, repeats=(500, 500), seconds=None, device=False)
    formats_option(options_parser, list(FORMATS))
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns = {"network": 12, "layer": 24, "format": 13, "native": 9, "again": 9, "long way": 9, "converted": 9}
    head = {"environment": environment("small_layers.py", arguments, torch.device("cpu"))}
    head["unit"] = "microseconds of a call; again, long way and converted: more than native"
    report = Report(columns, head, options.json, options.minutes)
    for layer in LAYERS:
        name = f"{layer.channels} x {layer.side} x {layer.side}, {layer.taps} x {layer.taps}, stride {layer.stride}"
        for layout in options.formats:
            known = {"network": layer.network, "layer": name, "format": layout}
            report.measure(known, partial(measure, layer, layout, options.repeats))
    return report.rows


if __name__ == "__main__":
    main()
