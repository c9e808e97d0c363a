"""What gpu_day.py asks of a GPU beside the benchmarks: facts, right or wrong, and single launches for other tools.

facts       versions, the device, and how long the first use of a kernel takes
correct     real layers, forward and all gradients, against float64; the same bits twice
small       the same for a few images and channels: for compute-sanitizer
launches    one forward and one weight gradient, marked for a profiler
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import FORMATS, bound, precision, relative_rms

from sw_transplant.cuda import storage
from sw_transplant.ops.toeplitz import (
    kernel_applies,
    toeplitz_conv,
    toeplitz_weight_grad,
    weight_grad_kernel_applies,
)
from sw_transplant.ops.toeplitz_reference import toeplitz_conv_reference
from sw_transplant.ops.toeplitz_selftest import SELF_TESTS, why_no_kernel

PACKAGES = ("torch", "triton", "numpy", "numba", "numba-cuda", "llvmlite", "cuda-bindings", "cuda-core")
PACKAGES += ("nvidia-nvjitlink", "nvidia-nvvm", "timm", "pytest", "pytest-xdist")
GRADIENTS = 10  # times the bound of a forward pass


class Layer(NamedTuple):
    """A map (B, C, H, W) and the kernels over it."""

    shape: tuple[int, int, int, int]
    sizes: Sequence[tuple[int, int]]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {' + '.join(f'{kh}x{kw}' for kh, kw in self.sizes)}"


def strips(long: int, short: int) -> list[tuple[int, int]]:
    return [(long, short), (short, long)]


REAL = [
    Layer((128, 124, 56, 56), strips(51, 5)),
    Layer((128, 249, 28, 28), strips(49, 5)),
    Layer((128, 499, 14, 14), strips(27, 5)),
    Layer((64, 128, 56, 56), [(31, 31)]),
    Layer((128, 160, 28, 28), [(13, 13)]),
    Layer((128, 96, 56, 56), [(7, 7)]),
    Layer((130, 64, 7, 7), strips(13, 5)),
    Layer((3, 8, 200, 336), strips(51, 5)),
    Layer((2, 8, 100, 168), [(31, 31)]),
]
SMALL = [
    Layer((5, 2, 28, 28), strips(49, 5)),
    Layer((3, 2, 56, 56), [(7, 7)]),
    Layer((1, 2, 100, 40), strips(31, 5)),
    Layer((9, 2, 14, 14), [(13, 13)]),
]


def facts() -> dict[str, Any]:
    """Versions, properties, seconds of the first uses in this process, and microseconds of a call in Python."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.device("cuda", torch.cuda.current_device())
    seconds: dict[str, float] = {}
    problems = {"toeplitz": timed(seconds, "why_no_kernel", lambda: why_no_kernel(device.index))}
    for (gradient, channels_last), test in list(SELF_TESTS.items())[1:]:
        what = f"{'weight gradient' if gradient else 'toeplitz'}{', channels_last' if channels_last else ''}"
        problems[what] = timed(seconds, f"trial: {what}", lambda test=test: test(device))
    microseconds = {}
    for dtype in (torch.float32, torch.float16):
        x, sizes, origins = torch.randn(2, 4, 56, 56, device=device).to(dtype), [51, 5, 5, 51], [25, 2, 2, 25]
        weights = [torch.randn(4, 1, *size, device=device).to(dtype) for size in strips(51, 5)]
        name = str(dtype).removeprefix("torch.")
        timed(seconds, f"first forward, {name}", lambda x=x, w=weights, o=origins: toeplitz_conv(x, w, o))
        timed(
            seconds,
            f"first weight gradient, {name}",
            lambda x=x, s=sizes, o=origins: toeplitz_weight_grad(x, x, s, o),
        )
        begin = time.perf_counter()
        for _ in range(500):
            toeplitz_conv(x, weights, origins)
        microseconds[name] = 2e3 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
    return {
        "versions": versions,
        "device": str(torch.cuda.get_device_properties(device)),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "problems": problems,
        "seconds": seconds,
        "microseconds of a call": microseconds,
        "kernels on disk": len(storage.entries()),
        "Numba was imported": "numba" in sys.modules,
    }


def timed(seconds: dict[str, float], what: str, call: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    seconds[what] = round(time.perf_counter() - begin, 3)
    return result


def compare(layers: Sequence[Layer], write: Callable[[list[dict]], None]) -> int:
    """Forward and gradients of all images, twice, against float64 in the first and last channel; how many are wrong."""
    rows: list[dict] = []
    for layer, name, layout in itertools.product(layers, ("tf32", "fp32", "fp16", "bf16"), FORMATS):
        with precision(name) as dtype:
            try:
                row = outcome(layer, dtype, bound(name), layout)
            except Exception as error:
                row = {"errors": [], "same bits": None, "kernel": None, "fine": False, "reason": repr(error)[:500]}
        rows.append({"layer": str(layer), "dtype": name, "format": layout, **row})
        print("ok   " if row["fine"] else "WRONG", *(f"{key}: {value};" for key, value in rows[-1].items()), flush=True)
        write(rows)
        torch.cuda.empty_cache()
    return sum(not row["fine"] for row in rows)


def outcome(layer: Layer, dtype: torch.dtype, limit: float, layout: str, device: str = "cuda") -> dict:
    """One layer in one dtype and memory format."""
    torch.manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    channels = layer.shape[1]
    x, grad = (make(*layer.shape).contiguous(memory_format=FORMATS[layout]) for _ in range(2))
    bias, weights = make(channels), [make(channels, 1, *size).requires_grad_() for size in layer.sizes]
    flat = [side for size in layer.sizes for side in size]
    origins = [side // 2 for side in flat]
    x.requires_grad_()
    runs = []
    for _ in range(2):
        y = toeplitz_conv(x, weights, origins, bias, True)
        runs.append([y.detach(), *torch.autograd.grad(y, [x, *weights], grad)])
    same = all(map(torch.equal, *runs))
    some = [0, channels - 1]
    wide = x.detach()[:, some].double().requires_grad_()
    kernels = [weight.detach()[some].double().requires_grad_() for weight in weights]
    y = toeplitz_conv_reference(wide, kernels, origins, bias[some].double(), True)
    exact = [y.detach(), *torch.autograd.grad(y, [wide, *kernels], grad[:, some].double())]
    got = [tensor[:, some] for tensor in runs[0][:2]] + [tensor[some] for tensor in runs[0][2:]]
    errors = [relative_rms(a, e) for a, e in zip(got, exact, strict=True)]
    applies = kernel_applies(x, weights, origins) and weight_grad_kernel_applies(x, flat, origins)
    fine = errors[0] <= limit and max(errors) <= GRADIENTS * limit and same and applies  # not so for NaN
    return {"errors": [float(f"{error:.2g}") for error in errors], "same bits": same, "kernel": applies, "fine": fine}


def launches() -> None:
    """One launch each of forward and weight gradient, in TF32 and float16, between marks for the profiler."""
    for dtype in (torch.float32, torch.float16):
        x, grad = torch.randn(2, 128, 124, 56, 56, device="cuda").to(dtype)
        weights = [torch.randn(124, 1, *size, device="cuda").to(dtype) for size in strips(51, 5)]
        bias, origins = torch.randn(124, device="cuda").to(dtype), [25, 2, 2, 25]
        for call in (
            lambda x=x, w=weights, b=bias, o=origins: toeplitz_conv(x, w, o, b),
            lambda x=x, g=grad, o=origins: toeplitz_weight_grad(x, g, [51, 5, 5, 51], o),
        ):
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code, 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("facts", "correct", "small", "launches"))
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args(arguments)

    def write(found: Any) -> None:
        if options.json is not None:
            part = options.json.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(options.json)

    if options.what == "launches":
        launches()
        return 0
    if options.what == "facts":
        found = facts()
        print(json.dumps(found, indent=1))
        write(found)
        return int(any(found["problems"].values()))
    wrong = compare(REAL if options.what == "correct" else SMALL, lambda rows: write({"rows": rows}))
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
