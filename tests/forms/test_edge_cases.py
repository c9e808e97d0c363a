"""What is rare and must run all the same: empty batches, writes into an output, kernels that do not reach the map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sw_transplant import SWConfig, convert
from sw_transplant.forms import FORMS
from tests.runtime_models import CHANNELS, LAYERS, images, layer

every_form = pytest.mark.parametrize("form", FORMS)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@every_form
@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch(name: str, form: str) -> None:
    module = layer(name, form)
    x = images(0, CHANNELS).requires_grad_()
    y = module(x)
    assert y.shape == (0, *module(images(1, CHANNELS)).shape[1:])
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(not parameter.grad.any() for parameter in module.parameters() if parameter.grad is not None)
    with torch.no_grad():
        assert module(x).shape == y.shape


@every_form
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_output_may_be_written_to(form: str, bias: bool, batch: int, training: bool) -> None:
    """As that of nn.Conv2d: ``y += 1`` after the layer, also where gradients are recorded."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=bias).double().train(training)
    module = convert(plain, SWConfig(form=form))
    results = []
    for one in (plain, module):
        x = images(batch, 4).double().requires_grad_()
        y = one(x * 1)
        y += 1
        y.mul_(2)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


# kernel, padding, dilation, stride, map
OUT_OF_REACH = {
    "between the taps": ((2, 7), (3, 3), (5, 1), (1, 1), (1, 8)),
    "between the taps, with stride": ((2, 7), (5, 26), (7, 1), (3, 2), (1, 9)),
    "before and behind the map": ((2, 7), (20, 3), (1, 1), (30, 1), (3, 8)),
}


@every_form
@pytest.mark.parametrize("case", OUT_OF_REACH)
def test_no_tap_reaches_the_map(case: str, form: str) -> None:
    kernel, padding, dilation, stride, size = OUT_OF_REACH[case]
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 3, kernel, stride, padding, dilation, groups=3).double()
    module = convert(plain, SWConfig(form=form))
    expected_x, x = (images(2, 3, size).double().requires_grad_() for _ in range(2))
    expected, y = plain(expected_x), module(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    expected.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, **CLOSE)
    torch.testing.assert_close(module.branches[0].bias.grad, plain.bias.grad, **CLOSE)
    taps = plain.weight.grad.numel() - int((plain.weight.grad == 0).sum())
    assert int((module.branches[0].bank.grad != 0).sum()) == taps  # most of them have none
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, **CLOSE)
