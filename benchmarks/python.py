"""What Python takes for one call of a layer, with operators that compute nothing: small batches are ruled by it.

On a CPU, form "toeplitz": `torch.ops.sw_transplant.toeplitz_conv` and its gradients give empty tensors, so that what is
left is layers, plans, autograd and the making of kernels from banks. nn.Conv2d is one of 1 x 1 taps, whose own work is
negligible. Each number is the least of many short batches of calls, which other programs disturb least.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from report import Report, environment, parser
from torch import Tensor, nn

import sw_transplant as sw
from sw_transplant.ops import direct

CHANNELS, SIDE, CALLS = 4, 14, 3


class Strips(nn.Module):
    """A stage of SLaK in small: two strips, each with its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Conv2d(CHANNELS, CHANNELS, (13, 5), padding=(6, 2), groups=CHANNELS)
        self.wide = nn.Conv2d(CHANNELS, CHANNELS, (5, 13), padding=(2, 6), groups=CHANNELS)
        self.tall_bn, self.wide_bn = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall_bn(self.tall(x)) + self.wide_bn(self.wide(x))


@contextmanager
def operators_that_compute_nothing() -> Iterator[None]:
    """The Toeplitz operators as Python sees them, without their kernels."""

    def conv(x: Tensor, weights: Any, origins: Any, bias: Any, residual: bool) -> Tensor:
        return torch.empty_like(x)

    def weight_grad(x: Tensor, grad: Tensor, sizes: Any, origins: Any) -> list[Tensor]:
        return [x.new_empty(x.shape[1], 1, *size) for size in zip(sizes[::2], sizes[1::2], strict=True)]

    before = dict(direct._OPERATORS)
    for name, run in (("toeplitz_conv", conv), ("toeplitz_weight_grad", weight_grad)):
        direct._OPERATORS[name] = before[name]._replace(run=run)
    try:
        yield
    finally:
        direct._OPERATORS.update(before)


def microseconds(function: Callable[[], object], rounds: int) -> float:
    """Of one call: the least of many batches of calls."""
    function()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(CALLS):
            function()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / CALLS


def step(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(module(x), [x, *module.parameters()], grad)


def measure(build: Callable[[], nn.Module], form: str, rounds: int) -> dict:
    """Eval, frozen, and a training step: of a layer as it is, or converted in a form."""
    module = build()
    if form != "native":
        module = sw.convert(module)
        sw.set_form(module, form)
    x, grad = torch.randn(2, 1, CHANNELS, SIDE, SIDE)
    leaf = x.clone().requires_grad_()
    found: dict[str, float | None] = {}
    with operators_that_compute_nothing():
        module.train()
        found["train"] = microseconds(lambda: step(module, leaf, grad), rounds)
        module.eval()
        with torch.no_grad():
            found["eval"] = microseconds(lambda: module(x), rounds)
            if form != "native":
                sw.freeze(module, x)
                found["frozen"] = microseconds(lambda: module(x), rounds)
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser(__doc__, repeats=(600, 600), seconds=None, device=False).parse_args(arguments)
    torch.set_num_threads(1)
    report = Report(
        {"layer": 28, "eval": 9, "frozen": 9, "train": 9},
        {"environment": environment("python.py", arguments, torch.device("cpu")), "unit": "microseconds of a call"},
        options.json,
        options.minutes,
    )
    rounds = options.repeats
    layers: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "nn.Conv2d, 1 x 1": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 1, groups=CHANNELS), "native"),
        "13 x 13, converted": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 13, padding=6, groups=CHANNELS), "toeplitz"),
        "strips with norms, converted": (Strips, "toeplitz"),
    }
    for name, (build, form) in layers.items():
        report.measure({"layer": name}, lambda build=build, form=form: [measure(build, form, rounds)])
    return report.rows


if __name__ == "__main__":
    main()
