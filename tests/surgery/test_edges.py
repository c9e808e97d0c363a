"""Extra edges on layers whose padding depends on the map, and whose kernels tiles do not fill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sw_transplant import SWConfig, convert, load, merge, save, set_form
from sw_transplant.forms import FORMS
from tests.find.test_search import SelfPadding, conv
from tests.runtime_models import images


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [7, 8])
def test_tensorflows_padding(stride: int, kernel: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SelfPadding(4, 4, kernel, stride, groups=4), conv(size=9)).double()
    converted = convert(model, SWConfig(edges=2, tile=5))
    assert [len(layer.branches[0].gain) for layer in converted] == [2, 2]
    save(converted, tmp_path)
    with torch.no_grad():
        grown = convert(model, SWConfig(edges=2, tile=5))
        for layer in grown:
            layer.branches[0].gain += 0.5
    for size in ((14, 13), (9, 20), (3, 2)):
        x = images(2, 4, size).double()
        expected = model(x)
        for form in FORMS:
            set_form(converted, form)
            torch.testing.assert_close(converted(x), expected, rtol=1e-11, atol=1e-11)
        for one in (load(model, tmp_path), merge(converted)):
            torch.testing.assert_close(one(x), expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(merge(grown)(x), grown(x), rtol=1e-11, atol=1e-11)
        folded = convert(model, SWConfig(edges=2, tile=5))
        folded.load_state_dict(grown.state_dict())
        folded[0].reparameterize()
        torch.testing.assert_close(folded(x), grown(x), rtol=1e-11, atol=1e-11)
