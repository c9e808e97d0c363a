"""The benchmark's command runs where there is no GPU, and its numbers are those of shift_add."""

import json
from pathlib import Path

import pytest
import torch

from sw_transplant.ops import shift_add


@pytest.fixture(scope="module")
def benchmark(load):
    return load("shift_add")


def test_prints_a_table_and_writes_it(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "folder" / "results.json"
    arguments = ["--device", "cpu", "--layers", "7", "--dtypes", "float32", "bfloat16", "--repeats", "1"]
    rows = benchmark.main([*arguments, "--json", str(file)])
    assert [(row["dtype"], row["pass"]) for row in rows] == [
        ("float32", "forward"),
        ("float32", "backward"),
        ("bfloat16", "forward"),
        ("bfloat16", "backward"),
    ]
    for row in rows:
        assert 0 < row["floor ms"]
        assert row["of floor"] == pytest.approx(row["floor ms"] / row["ms"])
        assert row["error"] <= {"float32": 1e-6, "bfloat16": 5e-3}[row["dtype"]]
    written = json.loads(file.read_text())
    assert written["rows"] == rows
    assert written["batch"] == 1
    assert capsys.readouterr().out.count("bfloat16") == 2


def test_its_placements_are_those_of_the_strips(benchmark) -> None:
    size, tile, side = 13, benchmark.TILE, 9
    placements, tiles = benchmark.strip_placements(size, torch.device("cpu"))
    assert tiles == 7
    torch.manual_seed(0)
    x = torch.randn(1, 1, side, side, dtype=torch.float64)
    bank = torch.randn(tiles, 1, tile, tile, dtype=torch.float64)
    bank[2, :, size % tile :] = 0  # the last tiles reach beyond the strips
    bank[5, :, :, size % tile :] = 0
    z = torch.nn.functional.conv2d(x, bank, padding=tile - 1)[:, None]
    out = shift_add(z, placements, (side, side))[:, 0, 0]
    vertical, horizontal = torch.cat(list(bank[:3, 0]), 0)[:size], torch.cat(list(bank[3:6, 0]), 1)[:, :size]
    for actual, kernel in zip(out, (vertical, horizontal, bank[6, 0]), strict=True):
        padding = tuple(s // 2 for s in kernel.shape)
        expected = torch.nn.functional.conv2d(x, kernel[None, None], padding=padding)[0, 0]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
