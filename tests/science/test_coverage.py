"""The authors' measure of utilisation: against the rules of their program, written down again; and its picture."""

import math

import numpy as np
import pytest
import torch

from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.science.coverage import coverage, coverage_picture, published_utilisation


def by_the_program(length: int, size: int, edges: int, ordered: bool, slip: bool) -> float:
    """One channel; tile ``order[i]`` is shifted by the i-th offset; draws as the program makes them."""
    n, tiles = 3, math.ceil(length / 3)
    offsets = [length // 2 - 3 * i - 2 for i in range(tiles)]
    generator = torch.Generator().manual_seed(123)
    horizontal = [torch.randperm(tiles, generator=generator) for _ in range(edges)]
    vertical = [torch.randperm(tiles, generator=generator) for _ in range(edges)]
    if ordered:
        generator.manual_seed(123)
        horizontal, vertical = [torch.arange(tiles)], [torch.arange(tiles).flip(0)]
    taken = torch.randint(0, tiles, [edges], generator=generator)
    seen = np.zeros((tiles, size + 4, size + 4))
    for edge in range(edges):
        for i, offset in enumerate(offsets):
            start = max(-offset, 0)
            stop = start + size - max(offset, 0)
            stop = stop if slip else max(stop, start)
            seen[horizontal[edge][i], n - 2 : size + 2, start:stop] = 1
            seen[vertical[edge][i], start:stop, n - 2 : size + 2] = 1
        seen[taken[edge], 2 : size + 2, 2 : size + 2] = 1
    return seen.mean()


@pytest.mark.parametrize("slip", [True, False])
@pytest.mark.parametrize(("length", "size"), [(49, 28), (47, 14), (13, 7)])
def test_it_is_what_the_program_counts(length: int, size: int, slip: bool) -> None:
    ordered = SWConv2d(1, length, edges=1, ghost=0, orders="opposite")
    assert published_utilisation(ordered, size, slip=slip) == pytest.approx(by_the_program(length, size, 1, True, slip))
    four = SWConv2d(1, length, edges=4, ghost=0)
    assert published_utilisation(four, size, slip=slip) == pytest.approx(by_the_program(length, size, 4, False, slip))


def test_the_published_numbers() -> None:
    for length, size in ((47, 14), (13, 7)):
        assert 0.5 < published_utilisation(SWConv2d(1, length, edges=1, ghost=0, orders="opposite"), size) < 0.62
        assert 0.91 < published_utilisation(SWConv2d(1, length, edges=4, ghost=0), size) < 0.935
    assert published_utilisation(SWConv2d(1, 47, edges=4, ghost=0), 14, slip=False) == pytest.approx(0.87, abs=0.005)


def test_a_square_per_tile() -> None:
    counts = coverage(SWConv2d(4, 13), (7, 9), channel=1)
    assert counts.shape == (5, 11, 13)
    picture = coverage_picture(counts, scale=2)
    assert picture.shape == (2 * (2 * 12 + 1), 2 * (3 * 14 + 1))
    inside = picture[2:24:2, 2:28:2]
    np.testing.assert_array_equal(inside == 0, counts[0].numpy() == 0)


def test_what_it_cannot_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stride \(2, 2\)"):
        coverage(SWConv2d(4, 13, stride=2), 7)
    with pytest.raises(ValueError, match="channel 9, expected one of the 4 active ones"):
        coverage(SWConv2d(4, 13, ghost=0), 7, channel=9)
