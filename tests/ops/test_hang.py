"""A convolution of PyTorch that never returns, and is never called: in a process of its own, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sw_transplant.ops.depthwise import depthwise_conv2d, may_hang

LIMIT = 120
"""Seconds; the process takes a few, most of them to import PyTorch."""

SCRIPT = """
import itertools
import torch
from torch import nn
from sw_transplant import SWConfig, convert

torch.set_num_threads(1)
layouts = (torch.contiguous_format, torch.channels_last)
for channels, kernel, layout in itertools.product((2, 16), ((15, 15), (5, 31)), layouts):
    plain = nn.Conv2d(channels, channels, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=channels)
    x = torch.randn(2, channels, 12, 33).contiguous(memory_format=layout)
    expected = plain.double()(x.double()).detach()
    plain.float()
    for form, tile, autocast in itertools.product(("auto", "shift", "toeplitz"), (None, 16), (False, True)):
        layer = convert(plain, SWConfig(form=form, tile=tile))
        if not autocast:
            layer.bfloat16()
        given = (x if autocast else x.bfloat16()).detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(given)
            y.float().sum().backward()
            with torch.no_grad():
                for _ in range(3):
                    again = layer(given)
        for result in (y, again):
            assert result.dtype is torch.bfloat16
            assert result.is_contiguous(memory_format=layout)
            assert (result.double() - expected).norm() <= 1e-2 * expected.norm()
        assert given.grad.isfinite().all()
print("returned")
"""


def test_bfloat16_maps_of_few_channels_return() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"a convolution did not return within {LIMIT} s")
    assert done.stdout == "returned\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("channels", "columns", "dtype", "expected"),
    [
        (16, 15, torch.bfloat16, True),
        (2, 51, torch.bfloat16, True),
        (17, 15, torch.bfloat16, False),
        (16, 14, torch.bfloat16, False),
        (16, 15, torch.float32, False),
        (16, 15, torch.float16, False),
    ],
)
def test_what_may_hang(channels: int, columns: int, dtype: torch.dtype, expected: bool) -> None:
    assert may_hang(torch.empty(channels, 1, 5, columns, dtype=dtype)) is expected


def test_it_is_computed_in_single_precision_and_rounded_once() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 9, 20), torch.randn(4, 1, 3, 15), torch.randn(4)
    x, weight, bias = (tensor.bfloat16() for tensor in (x, weight, bias))
    y = depthwise_conv2d(x, weight, bias, (1, 1), (1, 7), (1, 1))
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), 1, (1, 7), 1, 4)
    assert y.dtype is torch.bfloat16
    assert (y == exact.bfloat16()).float().mean() > 0.999  # but for ties that float32 breaks otherwise
