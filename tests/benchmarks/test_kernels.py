"""The table of layers: what it holds, that each cell is there or says why not, and that floors count what is done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sw_transplant.forms import FORMS

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--layers", "convnext.3", "--batch", "1", "--repeats", "1", "--seconds", "0"]


@pytest.fixture(scope="module")
def kernels(load):
    return load("kernels")


def test_every_form_is_measured(kernels, tmp_path, capsys) -> None:
    file = tmp_path / "kernels.json"
    rows = kernels.main([*TINY, "--dtypes", "fp32", "tf32", "--json", str(file)])
    assert [(row["dtype"], row["pass"]) for row in rows] == [
        ("fp32", "forward"),
        ("fp32", "forward+backward"),
        ("tf32", "forward"),
        ("tf32", "forward+backward"),
    ]
    names = ["native", "native cl", *FORMS, "auto"]
    for row in rows[:2]:
        assert row["reasons"] == {}
        assert row["auto runs"] in FORMS
        assert set(row["errors"]) == set(names)
        assert all(row[name] > 0 for name in names)
        assert 0 < row["error"] < 1e-5
        assert row["fastest"] in FORMS
        assert row["of floor"] == pytest.approx(row["floor"] / row[row["fastest"]])
        assert row["floor"] == max(row["copy floor"], row["operations floor"])
        assert row["speedup"] > 0
        assert row["auto speedup"] > 0
    for row in rows[2:]:
        assert [row[name] for name in names] == [None] * len(names)
        assert "CUDA" in row["reasons"]["row"]
    written = json.loads(file.read_text())
    assert written["rows"] == rows
    assert written["environment"]["command"].startswith("python benchmarks/kernels.py --device cpu")
    assert written["copy_bytes_per_second"] > 0
    assert written["operations_per_second"]["fp32"] > 0
    assert capsys.readouterr().out.count("convnext.3") == 4


def test_a_form_that_fails_or_is_wrong_is_an_empty_cell_with_its_reason(kernels, monkeypatch) -> None:
    assembled = FORMS["assembled"]

    def fails(x, *arguments):
        raise NotImplementedError("no maps of this size")

    def wrong(x, *arguments):
        return [1.01 * y for y in assembled.execute(x, *arguments)]

    monkeypatch.setitem(FORMS, "fails", assembled._replace(execute=fails))
    monkeypatch.setitem(FORMS, "wrong", assembled._replace(execute=wrong))
    forms = ["--forms", "fails", "assembled", "wrong"]
    (row,) = kernels.main([*TINY, "--dtypes", "fp32", "--forward-only", "--formats", "channels_last", *forms])
    assert row["fails"] is None
    assert row["wrong"] is None
    assert row["assembled"] > 0
    assert row["fastest"] == "assembled"
    assert row["reasons"]["fails"] == "NotImplementedError: no maps of this size"
    assert row["reasons"]["wrong"].startswith("wrong: relative RMS error 0.01 ")
    assert "auto" not in row
    assert row["auto speedup"] is None


@pytest.mark.parametrize("of", ["map", "kernels"])
def test_a_wrong_gradient_is_seen(kernels, monkeypatch, of: str) -> None:
    """1% too much in one of the two gradients, with the right output."""
    assembled = FORMS["assembled"]

    def execute(x, *arguments):
        whole, kernels_only = (assembled.execute(one, *arguments) for one in (x, x.detach()))
        sign = 1 if of == "kernels" else -1
        extra = 0 if of == "kernels" else 0.01
        return [
            y + extra * (y - y.detach()) + sign * 0.01 * (k - k.detach())
            for y, k in zip(whole, kernels_only, strict=True)
        ]

    monkeypatch.setitem(FORMS, "wrong", assembled._replace(execute=execute))
    (row,) = kernels.main([*TINY, "--dtypes", "fp32", "--backward", "--forms", "wrong"])
    assert row["wrong"] is None
    assert row["reasons"]["wrong"].startswith("wrong: relative RMS error 0.01 ")


def test_a_form_that_does_not_apply_is_not_timed_as_another(kernels) -> None:
    """The matrices of "gemm" would not fit on such a map: the layer runs as "assembled"."""
    arguments = ["--layers", "slak.0", "--dtypes", "fp32", "--forward-only", "--forms", "gemm", "auto"]
    (row,) = kernels.main([*TINY, *arguments])
    assert row["gemm"] is None
    assert row["reasons"]["gemm"].startswith("does not apply, it ran as assembled: gemm would take ")
    assert row["auto"] > 0
    assert row["auto runs"] in FORMS
    assert row["fastest"] == "auto"


def test_operations_are_the_taps_within_the_map(kernels) -> None:
    layer = kernels.Layer(2, 3, 9, ((13, 5), (5, 3)))
    ones = torch.ones(1, 1, 9, 9)
    taps = sum(
        torch.nn.functional.conv2d(ones, torch.ones(1, 1, *size), padding="same").sum() for size in layer.kernels
    )
    assert kernels.operations(layer, 2) == 2 * 2 * 3 * int(taps)
    by_bytes, by_operations = kernels.floors(layer, 2, False, 4, copy=1e3, product=1e3)
    assert by_bytes == 2 * (2 * 3 * 81) * 4
    assert by_operations == kernels.operations(layer, 2)
    assert kernels.floors(layer, 2, True, 4, 1e3, 1e3) == (5 * (2 * 3 * 81) * 4, 3 * by_operations)


def test_layers_are_chosen_by_what_their_names_begin_with(kernels) -> None:
    assert kernels.selected(["figure4.strips", "sw.1"]) == ["sw.1", *(f"figure4.strips.{r}" for r in (16, 32, 64, 128))]
    assert kernels.selected(["figure4.strips.16"]) == ["figure4.strips.16"]
    with pytest.raises(SystemExit):
        kernels.main(["--layers", "sw.17"])


@pytest.mark.exhaustive
def test_it_runs_as_a_command(tmp_path) -> None:
    file = tmp_path / "kernels.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *TINY, "--dtypes", "fp32", "--forward-only"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--forms", "auto", "--json", str(file)], env=environment, check=True, timeout=120)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["auto"] > 0
