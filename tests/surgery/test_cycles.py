"""Memory over many conversions: what convert, run, merge and restore hold is given back."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import sw_transplant as sw
from tests.small_models import Parallel, conv_bn

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


CHANNELS = 64


def strips() -> nn.Module:
    return Parallel(conv_bn(CHANNELS, 15), conv_bn(CHANNELS, 5))


def large() -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, 31, padding=15, groups=CHANNELS)


@pytest.mark.parametrize(
    ("cycles", "kinds"),
    [(25, [large]), pytest.param(1000, [large, strips], marks=pytest.mark.exhaustive)],
    ids=["quick", "long"],
)
def test_memory_is_flat_over_conversions(cycles: int, kinds: list) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(kind() for kind in kinds)).eval()
    x, curve = torch.randn(1, CHANNELS, 8, 8), []
    expected = model(x)
    for cycle in range(cycles):
        converted = sw.convert(model)
        with torch.no_grad():
            converted(x)
            got = sw.merge(converted)(x)
        model = sw.restore(converted)
        if cycle >= 20 and cycle % (cycles // 20) == 0:
            curve.append(resident())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    print("resident MiB:", [round(value / 2**20, 1) for value in curve])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    grown = min(curve[-3:]) - max(curve[:3])  # the allocator comes and goes by a few MiB
    assert grown < weights * cycles / 20, f"{grown:,} bytes more after {cycles} cycles, the weights are {weights:,}"
    assert grown < 8 * 2**20
