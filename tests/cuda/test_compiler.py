"""From Python to machine code without a GPU, and in processes that leave it on disk."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda import compiler, shift_add, storage
from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.sources import Job

pytestmark = pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing")
NOTHING = Job(compiler.NOTHING, (), (9, 0))
BACKWARD = Job(shift_add.BACKWARD, (torch.float16, 1, 1), (8, 0))


@pytest.fixture(autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", str(tmp_path))


def test_a_kernel_becomes_an_image_for_one_architecture() -> None:
    cubin = compiler.compile_job(NOTHING)
    assert cubin.image.startswith(b"\x7fELF")
    assert cubin.entry.encode() in cubin.image
    assert cubin.parameters == ""


def test_a_process_compiles_what_is_not_on_disk_yet(monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    storage.write(NOTHING, storage.Cubin("kept", "", b"as it is"))
    started = []
    popen = subprocess.Popen

    def noted(command, **options):
        started.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    impossible = Job(shift_add.FORWARD, ("no dtype",), (9, 0))
    compiler.compile_together([NOTHING, impossible, BACKWARD], processes=1)
    assert [command[0] for command in started] == [sys.executable]
    assert "KeyError" in capfd.readouterr().err  # said, and no obstacle to the others
    kept, first = storage.read(BACKWARD), storage.read(NOTHING)
    assert kept is not None
    assert kept.parameters == "ppp" + 17 * "i"
    assert first is not None
    assert first.image == b"as it is"
    assert len(storage.entries()) == 2
    compiler.compile_together([NOTHING, BACKWARD])
    assert len(started) == 1
