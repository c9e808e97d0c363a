"""Where NaN and infinity at one pixel go, by form; and the choice that keeps them where the kernel reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sw_transplant import SWConfig, convert, load, save, set_form
from sw_transplant.forms import Call
from sw_transplant.forms.dispatch import Conditions, Job, choose_form
from sw_transplant.geometry import Extent
from tests.runtime_models import CHANNELS, Strips, images

PIXEL = (0, 1, 7, 6)
values = pytest.mark.parametrize("value", [float("nan"), float("inf")])


def square() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS).double()


def reached(module: nn.Module, value: float, size: tuple[int, int] = (14, 13)) -> Tensor:
    """Which outputs are not finite where one pixel is not."""
    x = images(2, CHANNELS, size).double()
    x[PIXEL] = value
    with torch.no_grad():
        return ~module.eval()(x).isfinite()


@values
def test_what_the_table_of_forms_says(value: float) -> None:
    plain = square()
    kernel = reached(plain, value)
    assert kernel.sum() == 49
    assert torch.equal(reached(convert(plain, SWConfig(form="assembled")), value), kernel)
    shifted = reached(convert(plain, SWConfig(form="shift", tile=4)), value)
    assert shifted.sum() == 64  # 8 x 8: two tiles of 4
    assert (shifted | ~kernel).all()
    matrix = reached(convert(plain, SWConfig(form="gemm")), value)
    assert matrix[PIXEL[:2]].all()
    assert not matrix.flatten(2).any(2)[1].any()
    assert matrix.sum() == 14 * 13


@values
@pytest.mark.parametrize("mode", ["laid_out", "shiftwise"])
def test_local_keeps_auto_to_forms_that_keep_them_local(value: float, mode: str) -> None:
    """On a map where "auto" takes a matrix over the whole of it otherwise."""
    model = nn.Sequential(Strips() if mode == "shiftwise" else square()).double()
    free = convert(model, SWConfig(mode=mode, ghost=0))
    local = convert(model, SWConfig(mode=mode, ghost=0, nonfinite="local"))
    assert (free[0].nonfinite, local[0].nonfinite) == ("anywhere", "local")
    wide, narrow = reached(free, value), reached(local, value)
    assert (free[0].decision.form, local[0].decision.form) == ("gemm", "assembled")
    assert local[0].decision.reason == "keeps NaN and infinity local"
    assert narrow.sum() < wide.sum()
    if mode == "laid_out":
        assert torch.equal(narrow, reached(model, value))


def test_it_can_be_assigned_and_what_is_asked_for_runs() -> None:
    layer = convert(square())
    x = images(2, CHANNELS, (7, 7)).double()
    with torch.no_grad():
        expected = layer.eval()(x)
        assert layer.decision.form == "gemm"
        layer.nonfinite = "local"
        torch.testing.assert_close(layer(x), expected)
        assert layer.decision.form == "assembled"
        set_form(layer, "gemm")
        layer(x)
        assert layer.decision == ("gemm", "asked for")
    with pytest.raises(ValueError, match=r"nonfinite: got 'nearby', expected 'anywhere' or 'local'"):
        layer.nonfinite = "nearby"
    with pytest.raises(ValueError, match=r"SWConfig\.nonfinite: got 'nearby', expected one of \('anywhere', 'local'\)"):
        SWConfig(nonfinite="nearby")


@pytest.mark.parametrize("mode", ["laid_out", "shiftwise"])
def test_it_is_saved(tmp_path: Path, mode: str) -> None:
    model = nn.Sequential(square(), square())
    converted = convert(model, SWConfig(mode=mode, nonfinite="local"))
    converted[1].nonfinite = "anywhere"
    save(converted, tmp_path)
    assert [layer.nonfinite for layer in load(model, tmp_path)] == ["local", "anywhere"]
    path = tmp_path / "sw_config.json"
    description = json.loads(path.read_text())
    for layer in description["layers"]:
        del layer["nonfinite"]  # as earlier versions wrote it
    path.write_text(json.dumps(description))
    assert [layer.nonfinite for layer in load(model, tmp_path)] == ["anywhere", "anywhere"]
    description["layers"][0]["nonfinite"] = "nearby"
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="nonfinite: got 'nearby'"):
        load(model, tmp_path)


def test_the_decision_on_every_device() -> None:
    job = Job((64, 64), Call((7, 7), (7, 7), (1, 1), torch.float32), [(Extent((7, 7), (3, 3)),)], False)
    for device in ("cpu", "cuda:0", "mps"):
        given = Conditions(torch.device(device), False, False, None, False)
        assert choose_form("auto", job, given, local=True).form == "assembled"
    assert choose_form("shift", job, given, local=True).form == "shift"


def test_configurations_of_before_are_read() -> None:
    values = SWConfig().to_dict()
    assert values.pop("nonfinite") == "anywhere"
    assert SWConfig.from_dict(values) == SWConfig()
