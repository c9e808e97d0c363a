"""What a merged layer is: an nn.Conv2d by its attributes and the names of its state, whatever its padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, convert, merge
from sw_transplant.geometry import BranchGeometry
from sw_transplant.layers.branch import Branch
from sw_transplant.surgery.merge import UnevenConv2d
from tests.find.test_search import Parallel, conv_bn
from tests.runtime_models import images

UNEVEN = {"top and left": (4, 1, 5, 2), "bottom only": (0, 3, 0, 0), "one side": (3, 3, 6, 3)}


def uneven(sides: tuple[int, int, int, int]) -> ShiftwiseConv2d:
    torch.manual_seed(0)
    geometry = BranchGeometry((7, 8), sides)
    branch = Branch.from_kernel(geometry, torch.randn(8, 1, 7, 8), 4, bias=torch.randn(8))
    return ShiftwiseConv2d(4, 8, (2, 1), [branch]).eval()


@pytest.mark.parametrize("case", UNEVEN)
def test_uneven_padding(case: str) -> None:
    layer = uneven(UNEVEN[case])
    merged = merge(layer)
    assert isinstance(merged, UnevenConv2d)
    assert isinstance(merged, nn.Conv2d)
    assert list(merged.state_dict()) == ["weight", "bias"]
    assert torch.equal(merged.weight, layer.weight)
    assert (merged.kernel_size, merged.stride, merged.padding, merged.groups) == ((7, 8), (2, 1), layer.padding, 4)
    assert str(UNEVEN[case]) in repr(merged)
    for size in ((19, 22), (9, 8)):
        x = images(2, 4, size)
        expected = layer(x)
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged(x[0]), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_uneven_padding_is_scripted_traced_and_exported() -> None:
    merged, x, other = merge(uneven((4, 1, 5, 2))), images(2, 4, (19, 22)), images(2, 4, (11, 30))
    with torch.no_grad():
        assert torch.equal(torch.jit.script(merged)(other), merged(other))
        assert torch.equal(torch.jit.trace(merged, x)(other), merged(other))
        assert torch.equal(torch.export.export(merged, (x,)).module()(x), merged(x))


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_an_even_kernel_is_a_plain_convolution_again(dilation: int) -> None:
    plain = nn.Conv2d(4, 4, (8, 10), padding="same", dilation=dilation, groups=4)
    merged = merge(convert(plain))
    assert type(merged) is nn.Conv2d
    assert merged.padding == "same"
    assert merged.state_dict().keys() == plain.state_dict().keys()
    merged.load_state_dict(plain.state_dict())
    x = images(2, 4, (14, 31))
    assert torch.equal(merged(x), plain(x))
    assert isinstance(convert(merged), ShiftwiseConv2d)


def test_a_sum_that_grows_uneven_is_written_as_same() -> None:
    """Branches of even size, padded as "same" pads: the joined kernel says so."""
    model = Parallel(
        nn.Conv2d(4, 4, 8, padding="same", groups=4), nn.Conv2d(4, 4, 4, padding="same", groups=4), conv_bn(size=5)
    ).eval()
    merged, x = merge(convert(model)), images(2, 4, (15, 12))
    assert type(merged) is nn.Conv2d
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)
