"""What one thread block of each kernel does to memory, counted in an interpreter of its PTX; and how full a GPU gets.

    python -m tests.cuda.counts --json benchmarks/results/kernel_counts.json

Per plane, which is one image of one channel: lines of the cache (128 bytes) and sectors (32 bytes) that loads of the
map and stores of the output touch, an instruction of a warp at a time, and instructions of warps. Wavefronts of shared
memory are counted by their banks, per matrix product; barriers are those of one turn. Blocks, and how much of the
device is at work, are those of an H200 and a batch of 128. No GPU is needed, and nothing here is a time.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sw_transplant.cuda.toeplitz.gradient import settings as gradient_settings
from sw_transplant.cuda.toeplitz.gradient.kernel import gradient_source
from sw_transplant.cuda.toeplitz.gradient.launcher import divide_gradient
from sw_transplant.cuda.toeplitz.kernel import toeplitz_source
from sw_transplant.cuda.toeplitz.launcher import divide
from sw_transplant.cuda.toeplitz.settings import resident_blocks
from sw_transplant.cuda.toeplitz.staging import DTYPES
from tests.cuda.assembler import compile_to_ptx
from tests.cuda.lockstep import Lockstep
from tests.cuda.ptx_machine import Machine, Program, bits_of
from tests.cuda.toeplitz_cases import DEVICES, Layer, strips

H200, BATCH = DEVICES[9, 0], 128


class Main(NamedTuple):
    """A layer of a network, with the channels that it has there."""

    layer: Layer
    channels: int


LAYERS = [
    Main(Layer((56, 56), strips(51, 5)), 124),
    Main(Layer((28, 28), strips(49, 5)), 249),
    Main(Layer((56, 56), ((31, 31),)), 128),
    Main(Layer((28, 28), ((13, 13),)), 160),
    Main(Layer((56, 56), ((7, 7),)), 96),
]


class Uncounted(Lockstep):
    """Products that are not formed: nothing that is counted depends on them."""

    def mma(self, a, b, c):
        return c


class Counting(Machine):
    """Counts what instructions do to memory."""

    def __init__(self, program: Program, shared_bytes: int) -> None:
        super().__init__(program, shared_bytes, Uncounted)
        self.lines: Counter[int] = Counter()
        self.sectors: Counter[int] = Counter()
        self.wavefronts = 0

    def note(self, operation: str, space: str, addresses: np.ndarray, nbytes: int) -> None:
        if space == "shared":
            self.wavefronts += wavefronts(addresses, nbytes)
            return
        ends = np.concatenate([addresses, addresses + np.uint64(nbytes - 1)])
        buffer = int(addresses[0]) >> 36
        self.lines[buffer] += len(set((ends >> np.uint64(7)).tolist()))
        self.sectors[buffer] += len(set((ends >> np.uint64(5)).tolist()))


def wavefronts(addresses: np.ndarray, nbytes: int) -> int:
    """Passes over the 32 banks: 32 lanes of 4 bytes, 16 of 8, 8 of 16 at a time, and one for each word of a bank."""
    together, total = 128 // max(4, nbytes), 0
    for first in range(0, len(addresses), together):
        words = {int(a) // 4 + i for a in addresses[first : first + together] for i in range(max(1, nbytes // 4))}
        total += max(Counter(word % 32 for word in words).values())
    return total


def counts(main: Main, math: str, channels_last: bool, gradient: bool) -> dict[str, Any]:
    """One row of the table."""
    layer, channels = main
    kind = {"channels": channels} if channels_last else {}
    plan: Any = layer.gradient_plan(math, **kind) if gradient else layer.plan(math, **kind)
    if plan is None:
        return {"plan": "none: a contiguous copy is made"}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch, depth = (1, channels) if channels_last else (plan.planes, 1)
    x, other = (torch.randn(batch, depth, *layer.size).to(DTYPES[math]) for _ in range(2))
    x, other = (tensor.contiguous(memory_format=layout) for tensor in (x, other))
    source = gradient_source(plan) if gradient else toeplitz_source(plan, False, False)
    machine = Counting(Program(compile_to_ptx(source)), 4 * plan.shared_words)
    maps = [machine.address(bits_of(tensor)) for tensor in (x, other)]
    if gradient:
        taps = machine.address(bits_of(torch.zeros(depth * plan.taps)))
        tiles = [-(-s // t) for s, t in zip(layer.size, plan.tile, strict=True)]
        items = batch * tiles[0] * tiles[1]
        arguments, turns = [*maps, taps, items, depth, *layer.size, *tiles], -(-items // plan.items)
    else:
        weights = [machine.address(bits_of(torch.zeros(depth, 1, *size))) for size in layer.sizes]
        weights += weights[-1:] * (4 - len(weights))
        tiles = [-(-s // t) for s, t in zip(layer.size, plan.step_out, strict=True)]
        arguments, turns = [maps[0], *weights, maps[0], maps[1], batch, depth, *layer.size, *tiles], 1
    machine.launch(1, plan.threads, [*arguments, turns])

    planes, done, warps = plan.planes, machine.executed, plan.threads // 32
    products = sum(n for name, n in done.items() if name.startswith("mma")) / (3 if math == "tf32x3" else 1)
    divided = divide_gradient if gradient else divide
    slots = H200.multiprocessors * (gradient_settings.resident_blocks if gradient else resident_blocks)(plan, H200)
    grid: Any = divided(plan, BATCH, channels, layer.size, H200)
    every = -(-grid.items // plan.items) if gradient else -(-BATCH // (plan.planes // plan.channels))
    waves = -(-grid.blocks // slots)
    each = grid.blocks // -(-every // grid.turns)
    barriers = sum(n for name, n in done.items() if name.startswith("bar.sync")) / warps
    return {
        "planes": planes,
        "values of a load": plan.vector,
        "lines read": round(machine.lines[1] / planes),
        "sectors read": round(machine.sectors[1] / planes),
        "lines of the other map" if gradient else "lines written": round(machine.lines[2] / planes),
        "sectors of the other map" if gradient else "sectors written": round(machine.sectors[2] / planes),
        "lines in a map": -(-layer.size[0] * layer.size[1] * x.itemsize // 128),
        "instructions": round(sum(done.values()) / planes),
        "products": round(products / planes),
        "shared wavefronts per product": round(machine.wavefronts / products, 2),
        "barriers": barriers,
        "warps of a multiprocessor": slots // H200.multiprocessors * warps,
        "blocks": grid.blocks,
        "waves": round(grid.blocks / slots, 2),
        "turns": grid.turns,
        "at work": round(every * each / (waves * slots * grid.turns), 2),
    }


def write(path: Path, table: list[dict[str, Any]]) -> None:
    """Put the table into a file, beside what was counted before staging by whole runs, where that is in it."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= {"command": "python -m tests.cuda.counts --json benchmarks/results/kernel_counts.json", "after": table}
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--maths", nargs="+", default=["tf32", "float16"])
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    for case in LAYERS:
        for gradient in (False, True):
            for math in options.maths:
                for channels_last in (False, True):
                    row = counts(case, math, channels_last, gradient)
                    kernel = "weight gradient" if gradient else "forward"
                    layout = "channels_last" if channels_last else "contiguous"
                    table.append({"layer": str(case.layer), "kernel": kernel, "math": math, "format": layout, **row})
                    print(json.dumps(table[-1]), flush=True)
                    if options.json:
                        write(options.json, table)


if __name__ == "__main__":
    main()
