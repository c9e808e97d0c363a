"""Which responses are used: counted one by one, and the numbers of the paper's coverage analysis."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sw_transplant import convert
from sw_transplant.layers.orders import BRANCHES
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.science.utilisation import utilisation


def reached(module, size):
    """Which responses centred on the map are read, (active, T, H, W): every output of every tile, one by one."""
    n, far = module.tile, 100
    seen = torch.zeros(len(module.active), module.tiles, size[0] + 2 * far, size[1] + 2 * far, dtype=torch.bool)

    def read(channel, tile, down, right):
        window = seen[channel, tile, far + down :, far + right :]
        window[: size[0] : module.stride[0], : size[1] : module.stride[1]] = True

    back = module.length // 2 - n // 2  # from the centre of the first tile to that of the strip
    for edge in range(module.edges):
        for c in range(len(module.active)):
            for t in range(module.tiles):
                read(c, t, 0, n * int(module.horizontal[edge, c, t]) - back)
                read(c, t, n * int(module.vertical[edge, c, t]) - back, 0)
            read(c, int(module.identity[edge, c]), 0, 0)
    return seen[:, :, far:-far, far:-far]


@pytest.mark.parametrize("settings", [{}, {"edges": 1}, {"stride": 2}, {"tile": 5}, {"tile": 2, "stride": (1, 3)}])
@pytest.mark.parametrize("size", [(9, 6), (14, 20)])
def test_counts_the_responses_that_have_an_influence(settings, size):
    module = SWConv2d(6, 17, **settings)
    assert utilisation(module, size).total == pytest.approx(reached(module, size).float().mean().item())


@pytest.mark.parametrize(("length", "size"), [(47, 14), (13, 7)])
def test_the_papers_coverage(length, size):
    one, two, four = (utilisation(SWConv2d(64, length, edges=edges), size) for edges in (1, 2, 4))
    horizontal, vertical, _ = one.branches
    assert horizontal == vertical == pytest.approx({14: 0.290, 7: 0.457}[size], abs=1e-3)
    assert four.total > 0.95
    assert one.total < two.total < four.total
    assert [a < b < c for a, b, c in zip(one.branches, two.branches, four.branches, strict=True)] == [True] * 3


def test_about_35_percent_with_one_edge_over_the_two_late_stages():
    shares = [utilisation(SWConv2d(64, length, edges=1), size).branches[0] for length, size in ((47, 14), (13, 7))]
    assert sum(shares) / 2 == pytest.approx(0.35, abs=0.03)


def test_masked_filters_do_not_count():
    module = SWConv2d(6, 17, masked=True)
    used = reached(module, (9, 9)).float().mean((2, 3))
    with torch.no_grad():
        for path in module.paths:
            path.mask.copy_(torch.rand(path.mask.shape) < 0.4)
    live = module.paths[0].mask | module.paths[1].mask
    assert utilisation(module, 9).total == pytest.approx(used[live].mean().item())
    for path in module.paths:
        path.mask.zero_()
    assert utilisation(module, 9).total == 0


def test_of_a_laid_out_layer():
    conv = nn.Conv2d(2, 2, (21, 3), padding=(10, 1), groups=2)
    share = utilisation(convert(nn.Sequential(conv))[0], 7)
    x = torch.ones(1, 1, 7, 7)
    used = 0.0
    for first in range(0, 21, 3):  # a tile's response at the centre row r is read by output r + 10 - (first + 1)
        used += F.pad(x, (0, 0, 30, 30))[0, 0, 30 + first - 9 :][:7].mean().item()
    assert len(share.branches) == 1
    assert share.total == share.branches[0] == pytest.approx(used / 7)


def test_a_map_without_output_is_refused():
    conv = nn.Conv2d(2, 2, 9, groups=2)
    with pytest.raises(ValueError, match=r"a map \(5, 5\) gives an output \(-3, -3\)"):
        utilisation(convert(nn.Sequential(conv))[0], 5)


def test_branches_come_in_the_order_of_the_module():
    module = SWConv2d(8, 13)
    assert len(module.branches) == len(BRANCHES) + 1
    assert len(utilisation(module, 7).branches) == len(BRANCHES)
