"""The table of the acceptance models on a CPU, and what its check objects to."""

import json
from pathlib import Path

import pytest

from tests.sampling import sample


@pytest.fixture(scope="module")
def cpu(load):
    return load("cpu")


MODELS = {
    "ConvNextV2Backbone": ["hf ConvNextV2Backbone"],
    "EfficientNet b0": ["hf EfficientNet b0"],
    "UniRepLKNet": ["UniRepLKNet"],
    "SLaK-T": ["SLaK-T, its authors' norms", "SLaK-T, sw_transplant.models"],
}


@pytest.mark.parametrize("models", sample([[*MODELS], [*MODELS][:2]], [[*MODELS][:2]]), ids=len)
def test_models_of_the_acceptance_tests(cpu, models, tmp_path: Path, capsys) -> None:
    file = tmp_path / "cpu.json"
    options = ["--size-scale", "0.2", "--batch", "1", "--repeats", "1", "--seconds", "0", "--json", str(file)]
    rows = cpu.main(["--models", *models, *options])
    assert [(row["model"], row["size"], row["batch"], row["format"]) for row in rows] == [
        (name, 32, 1, layout)
        for model in models
        for name in MODELS[model]
        for layout in ("contiguous", "channels_last")
    ]
    for row in rows:
        if row["model"] == "hf EfficientNet b0":
            assert row["converted"] is None
            assert row["ratio"] is None
            assert cpu.nothing_to_convert(row)
        else:
            assert row["reasons"] == {}
            assert row["rounds"] == 1
            assert row["ratio"] == pytest.approx(row["native"] / row["converted"])
            assert 0 < row["error"] < 1e-5
    assert json.loads(file.read_text())["rows"] == rows
    *_, lowest, below = capsys.readouterr().out.splitlines()
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    assert lowest.startswith(f"lowest ratio: {min(ratios):.3f}, ")
    assert below == f"below 0.97: {sum(ratio < 0.97 for ratio in ratios)} of {len(ratios)}"


def test_what_the_check_objects_to(cpu) -> None:
    where = {"size": 224, "batch": 1, "format": "contiguous"}
    row = {"model": "fine", **where, "ratio": 0.98}
    slow = {"model": "slow", **where, "ratio": 0.96}
    slak = {"model": "SLaK-T, its authors' norms", **where, "ratio": 1.4}
    broken = {"model": "broken", **where, "ratio": None, "reasons": {"converted": "RuntimeError: no"}}
    small = {"model": "small", **where, "ratio": None, "reasons": {"converted": "NoLargeKernelError: nothing"}}
    assert cpu.shortfalls([row, small]) == []
    found = cpu.shortfalls([row, slow, slak, broken, small])
    assert [text.partition(",")[0] for text in found] == ["slow", "SLaK-T", "broken"]


def test_without_the_tests_it_says_what_is_missing(cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cpu, "ACCEPTANCE", Path("/no/such/folder/acceptance.py"))
    with pytest.raises(SystemExit) as stop:
        cpu.main([])
    assert stop.value.code == 2
    assert "run this from a checkout" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        cpu.main(["--models", "no such model"])
