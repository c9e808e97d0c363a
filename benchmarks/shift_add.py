"""Time of shift_add against the memory traffic that it cannot avoid, layer by layer of SLaK-T.

    python benchmarks/shift_add.py                       a table on the screen
    python benchmarks/shift_add.py --json results.json   the same numbers in a file

Each layer has the strips M x 5 and 5 x M and the square 5 x 5, laid out as 5 x 5 tiles: three branches, one launch. The
floor is bytes(z) + bytes(out) over the copy rate of this device, measured here. The error is against float64. The
kernel is the operator as users call it; on a GPU the cache is flushed before each call.
"""

from __future__ import annotations

from functools import partial

import torch
from common import Clock, copy_rate, median_ms, relative_rms
from report import Report, device_name, parser, positive, use_device
from torch import Tensor

from sw_transplant.ops import shift_add, shift_add_backward_reference, shift_add_reference

TILE = 5
LAYERS = [(56, 124, 51), (28, 249, 49), (14, 499, 47), (7, 998, 13)]  # map, channels, long side of the strips
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = {
    "map": 6,
    "channels": 9,
    "strips": 21,
    "dtype": 9,
    "pass": 9,
    "ms": 10,
    "floor ms": 10,
    "of floor": 9,
    "reference ms": 13,
    "speedup": 8,
    "error": 9,
}


def strip_placements(size: int, device: torch.device) -> tuple[Tensor, int]:
    """Table (3, 1, P, 3) of the branches size x 5, 5 x size and 5 x 5, and the number of tiles, each placed once."""
    count = -(-size // TILE)
    origin, middle = TILE - 1 - size // 2, TILE - 1 - TILE // 2
    vertical = [(i, origin + TILE * i, middle) for i in range(count)]
    horizontal = [(count + i, middle, origin + TILE * i) for i in range(count)]
    square = [(2 * count, middle, middle)] + [(-1, 0, 0)] * (count - 1)
    table = torch.tensor([vertical, horizontal, square], dtype=torch.int32, device=device)
    return table[:, None].contiguous(), 2 * count + 1


def bench_layer(
    layer: tuple[int, int, int], name: str, batch: int, clock: Clock, rate: float, repeats: int
) -> list[dict]:
    """Forward and backward of one layer in one dtype."""
    side, channels, size = layer
    device = clock.device
    placements, tiles = strip_placements(size, device)
    z_size, out_size = (side + TILE - 1,) * 2, (side, side)
    generator = torch.Generator(device).manual_seed(0)
    options = {"dtype": DTYPES[name], "device": device, "generator": generator}
    z = torch.randn(batch, channels, tiles, *z_size, **options)
    grad = torch.randn(len(placements), batch, channels, *out_size, **options)
    backward = torch.ops.sw_transplant.shift_add_backward

    out, grad_z = shift_add(z, placements, out_size), backward(grad, placements, tiles, z_size, (1, 1))
    exact = shift_add_reference(z[-1:].double(), placements, out_size)  # one image: float64 takes room
    exact_grad = shift_add_backward_reference(grad[:, -1:].double(), placements, tiles, z_size)
    errors = [relative_rms(out[:, -1:], exact), relative_rms(grad_z[-1:], exact_grad)]
    del exact, exact_grad
    runs = {
        "forward": (
            lambda: shift_add(z, placements, out_size),
            lambda: shift_add_reference(z, placements, out_size),
        ),
        "backward": (
            lambda: backward(grad, placements, tiles, z_size, (1, 1)),
            lambda: shift_add_backward_reference(grad, placements, tiles, z_size),
        ),
    }
    floor = 1e3 * (z.nbytes + out.nbytes) / rate
    del out, grad_z
    rows = []
    for (direction, (kernel, reference)), error in zip(runs.items(), errors, strict=True):
        ms, reference_ms = median_ms(kernel, clock, repeats), median_ms(reference, clock, min(repeats, 5))
        values = [f"{side}x{side}", channels, f"{size}x{TILE} + {TILE}x{size} + {TILE}x{TILE}", name, direction]
        values += [ms, floor, floor / ms, reference_ms, reference_ms / ms, error]
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    options_parser = parser(__doc__, repeats=(30, 3), seconds=None)
    options_parser.add_argument("--batch", type=positive, help="images; default 64 on a GPU, 1 on a CPU")
    options_parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options_parser.add_argument(
        "--layers", nargs="+", type=int, choices=[layer[0] for layer in LAYERS], help="map sizes; all unless given"
    )
    options = options_parser.parse_args(arguments)
    device = use_device(options.device)
    batch = options.batch or (64 if device.type == "cuda" else 1)

    clock = Clock(device, cold=True)
    rate = copy_rate(clock, options.repeats)
    name = device_name(device)
    print(f"{name}, torch {torch.__version__}, batch {batch}, copy {rate / 1e9:.0f} GB/s")
    head = {"device": name, "torch": torch.__version__, "batch": batch, "copy_bytes_per_second": rate}
    report = Report(COLUMNS, head, options.json, options.minutes)
    for layer in LAYERS:
        if options.layers and layer[0] not in options.layers:
            continue
        for dtype in options.dtypes:
            known = {"map": f"{layer[0]}x{layer[0]}", "channels": layer[1], "dtype": dtype}
            report.measure(known, partial(bench_layer, layer, dtype, batch, clock, rate, options.repeats))
    return report.rows


if __name__ == "__main__":
    main()
