"""The commands on a GPU: time between events, peak memory, TF32."""

import pytest

pytestmark = pytest.mark.gpu
QUICK = ["--device", "cuda", "--repeats", "3", "--seconds", "0"]


def test_layers(load) -> None:
    rows = load("kernels").main([*QUICK, "--layers", "slak.3", "--batch", "4", "--dtypes", "fp32", "tf32", "fp16"])
    assert len(rows) == 6
    for row in rows:
        assert row["native"] > 0
        assert row["auto"] > 0
        assert row["of floor"] < 1.2, "faster than the device can be"


def test_networks(load) -> None:
    arguments = ["--models", "convnext_atto", "--batch", "4", "--dtypes", "tf32", "fp16", "--no-compile"]
    for row in load("throughput").main([*QUICK, *arguments]):
        assert row["ratio"] > 0


def test_training(load) -> None:
    arguments = ["--subjects", "slak_tiny.3", "--batch", "4", "--dtypes", "fp32", "--forms", "shift", "assembled"]
    for row in load("training").main([*QUICK, *arguments]):
        kept = row["kept"] * 4 * 998 * 7 * 7 * 4  # bytes: a multiple of those of the input (4, 998, 7, 7)
        assert row["peak MiB"] * 2**20 >= kept / 2
        assert row["native peak MiB"] > 0
