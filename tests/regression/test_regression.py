"""Folders that earlier versions wrote are loaded, and give what they gave: one folder of every kind of each release."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sw_transplant as sw
from sw_transplant.check.recheck import check_folder
from sw_transplant.forms import FORMS
from tests.regression.networks import KINDS

HERE = Path(__file__).parent
RELEASES = sorted(place.name for place in HERE.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", place.name))
FOLDERS = [f"{release}/{kind}" for release in RELEASES for kind in KINDS]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_gives_what_it_gave(folder: str) -> None:
    build, config = KINDS[Path(folder).name]
    answers = load_file(HERE / folder / "answers.safetensors")
    model = sw.load(build(), HERE / folder).eval()
    layers = [module for module in model.modules() if isinstance(module, sw.ShiftwiseConv2d)]
    assert {layer.form for layer in layers} == {config.form}
    assert {layer.nonfinite for layer in layers} == {config.nonfinite}
    for form in (config.form, *FORMS):
        sw.set_form(model, form)
        with torch.no_grad():
            outputs = model(answers["images"])
        torch.testing.assert_close(outputs, answers["outputs"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(build()(answers["images"]), answers["outputs"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("release", RELEASES)
def test_certificate_is_still_read(release: str) -> None:
    """Without the original, whose statistics another processor computes with other last bits."""
    report = check_folder(HERE / release / "certified")
    wrong = [finding.what for finding in report.findings if finding.ok is False]
    assert wrong == [], str(report)


def test_this_version_is_kept() -> None:
    assert sw.__version__ in RELEASES, f"python -m tests.regression {sw.__version__}"
