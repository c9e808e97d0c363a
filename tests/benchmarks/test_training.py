"""The table of training: time, memory and errors of blocks and networks."""

import json

import pytest
import torch
from torch import nn

from sw_transplant.forms import FORMS
from tests.sampling import sample

SUBJECTS = [("convnext_atto.3", ("fp32", "bf16")), ("convnext_atto", ("fp32",)), ("convnext_atto", ("bf16",))]
TINY = ["--device", "cpu", "--size", "64", "--batch", "2", "--repeats", "1", "--seconds", "0"]


@pytest.fixture(scope="module")
def training(load):
    return load("training")


@pytest.mark.parametrize(("subject", "dtypes"), sample(SUBJECTS, SUBJECTS[:1]), ids=str)
def test_blocks_and_networks(training, tmp_path, subject: str, dtypes: tuple[str, ...]) -> None:
    file = tmp_path / "training.json"
    rows = training.main([*TINY, "--subjects", subject, "--dtypes", *dtypes, "--json", str(file)])
    assert [(row["subject"], row["dtype"], row["form"]) for row in rows] == [
        (subject, dtype, form) for dtype in dtypes for form in (*FORMS, "auto")
    ]
    for row in rows:
        assert row["reasons"] == {}, row
        assert all(row[name] > 0 for name in ("native", "converted", "ratio", "native kept", "kept"))
        assert row["peak MiB"] == row["native peak MiB"] == "not on a CPU"
        if row["dtype"] == "fp32":
            assert 0 < row["error"] < 1e-4
    assert json.loads(file.read_text())["rows"] == rows


def test_the_papers_module_has_no_native_form(training) -> None:
    rows = training.main([*TINY, "--subjects", "sw_tiny.3", "--dtypes", "fp32", "--forms", "assembled"])
    assert [row["form"] for row in rows] == ["shift", "assembled"]
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["native"] is None
        assert "the paper's own module" in row["reasons"]["native"]
        assert row["converted"] > 0
        assert row["ratio"] > 0


@pytest.mark.exhaustive
def test_a_form_that_fails_is_an_empty_cell_with_its_reason(training, monkeypatch) -> None:
    def fails(x, *arguments):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setitem(FORMS, "fails", FORMS["assembled"]._replace(execute=fails))
    arguments = ["--subjects", "convnext_atto.3", "no_such_network", "convnext_atto.9", "--dtypes", "fp32"]
    row, unknown, stage = training.main([*TINY, *arguments, "--forms", "fails"])
    assert row["native"] > 0
    assert row["converted"] is None
    assert row["kept"] is None
    assert row["reasons"] == {"converted": "OutOfMemoryError: too large"}
    assert "no_such_network" in unknown["reasons"]["row"]
    assert "stage 9, expected 0 to 3" in stage["reasons"]["row"]


def test_blocks_are_the_large_kernels_of_their_stage(training) -> None:
    module, shape, is_layer = training.build_subject("slak_tiny.3", 64)
    assert type(module).__name__ == "ReparamLargeKernelConv"
    assert module.training
    assert is_layer
    assert shape == (998, 2, 2)
    module, shape, is_layer = training.build_subject("sw_tiny.3", 64)
    assert module.kernel_size == (15, 15)
    assert shape == (640, 2, 2)


def test_what_is_kept_for_backward_is_counted_once(training) -> None:
    x = torch.randn(2, 4, 8, 8)
    convs = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.ReLU())
    assert training.saved_bytes(convs, x, torch.float32) == 2 * x.nbytes  # the map, and the output of ReLU
    assert training.saved_bytes(nn.Identity(), x.requires_grad_(), torch.float32) == 0
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = shared

        def forward(self, x):
            return self.conv(x) + self.conv(x)

    assert training.saved_bytes(Twice(), x, torch.float32) == x.nbytes
