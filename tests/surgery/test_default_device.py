"""The default device is another one than the model's: whatever is made on the way is made where the model is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sw_transplant import SWConfig, convert, load, merge, save, set_form
from sw_transplant.forms import FORMS
from tests.runtime_models import CHANNELS, Strips, images

CONFIGS = {"laid out": SWConfig(), "edges": SWConfig(edges=3), "shiftwise": SWConfig(mode="shiftwise")}


@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_calls_saving_and_merging(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Strips(), nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS)).eval()
    x = images(2, CHANNELS)
    expected = convert(model, CONFIGS[name])(x)
    with torch.device("meta"):  # nothing can be read from it
        converted = convert(model, CONFIGS[name])
        assert torch.equal(converted(x), expected)
        save(converted, tmp_path)
        assert torch.equal(load(model, tmp_path)(x), expected)
        torch.testing.assert_close(merge(converted)(x), expected, rtol=1e-4, atol=1e-4)
        for form in FORMS:
            set_form(converted, form)
            torch.testing.assert_close(converted.eval()(x), expected, rtol=1e-4, atol=1e-4)
            converted.train()(x).square().mean().backward()
            converted.load_state_dict({k: v.clone() for k, v in convert(model, CONFIGS[name]).state_dict().items()})
    assert {tensor.device.type for tensor in (*converted.parameters(), *converted.buffers())} == {"cpu"}
