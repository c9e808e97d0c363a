"""Time of shift_add against the memory traffic that it cannot avoid, layer by layer of SLaK-T.

    python benchmarks/shift_add.py                       a table on the screen
    python benchmarks/shift_add.py --json results.json   the same numbers in a file

Each layer has the strips M x 5 and 5 x M and the square 5 x 5, laid out as 5 x 5 tiles: three branches, one launch. The
floor is bytes(z) + bytes(out) over the copy rate of this device, measured here. The error is against float64. The
kernel is the operator as users call it: its launch is part of the time.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sw_transplant.ops import shift_add, shift_add_backward_reference, shift_add_reference

TILE = 5
LAYERS = [(56, 124, 51), (28, 249, 49), (14, 499, 47), (7, 998, 13)]  # map, channels, long side of the strips
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = [
    "map",
    "channels",
    "strips",
    "dtype",
    "pass",
    "ms",
    "floor ms",
    "of floor",
    "reference ms",
    "speedup",
    "error",
]


def strip_placements(size: int, device: torch.device) -> tuple[Tensor, int]:
    """Table (3, 1, P, 3) of the branches size x 5, 5 x size and 5 x 5, and the number of tiles, each placed once."""
    count = -(-size // TILE)
    origin, middle = TILE - 1 - size // 2, TILE - 1 - TILE // 2
    vertical = [(i, origin + TILE * i, middle) for i in range(count)]
    horizontal = [(count + i, middle, origin + TILE * i) for i in range(count)]
    square = [(2 * count, middle, middle)] + [(-1, 0, 0)] * (count - 1)
    table = torch.tensor([vertical, horizontal, square], dtype=torch.int32, device=device)
    return table[:, None].contiguous(), 2 * count + 1


def median_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call; on a GPU between events, the L2 cache cold."""
    function()
    times = []
    if device.type == "cuda":
        flush = torch.empty(2**28, dtype=torch.int8, device=device)
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
    else:
        for _ in range(repeats):
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes read and written each second by a large copy."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), device, repeats)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def bench_layer(
    layer: tuple[int, int, int], name: str, batch: int, device: torch.device, rate: float, repeats: int
) -> list[dict]:
    """Forward and backward of one layer in one dtype."""
    side, channels, size = layer
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
        ms, reference_ms = median_ms(kernel, device, repeats), median_ms(reference, device, min(repeats, 5))
        values = [f"{side}x{side}", channels, f"{size}x{TILE} + {TILE}x{size} + {TILE}x{TILE}", name, direction]
        values += [ms, floor, floor / ms, reference_ms, reference_ms / ms, error]
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def show(row: dict | None = None) -> None:
    """Print one row of the table, or its head."""
    widths = [6, 9, 21, 9, 9, 10, 10, 9, 13, 8, 9]
    cells = COLUMNS if row is None else [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
    print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--batch", type=int, help="images; default 64 on a GPU, 1 on a CPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layers", nargs="+", type=int, choices=[layer[0] for layer in LAYERS], help="map sizes")
    parser.add_argument("--repeats", type=int, help="timed calls; default 30 on a GPU, 3 on a CPU")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    batch = options.batch or (64 if device.type == "cuda" else 1)
    repeats = options.repeats or (30 if device.type == "cuda" else 3)

    rate = copy_rate(device, repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, batch {batch}, copy {rate / 1e9:.0f} GB/s")
    show()
    rows = []
    for layer in LAYERS:
        if options.layers and layer[0] not in options.layers:
            continue
        for dtype in options.dtypes:
            for row in bench_layer(layer, dtype, batch, device, rate, repeats):
                show(row)
                rows.append(row)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        head = {"device": name, "torch": torch.__version__, "batch": batch, "copy_bytes_per_second": rate}
        options.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
