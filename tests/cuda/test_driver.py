"""Loading and launching by CUDA's driver alone, against a driver that is as strict and runs nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("cc")


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA's driver has another name here")
def test_against_a_driver_that_runs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings", reason="the CUDA extra is not installed")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-o", library, "tests/cuda/driver.c", "-ldl"], cwd=ROOT, check=True
    )
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "SW_TRANSPLANT_CACHE": str(tmp_path / "kernels"),
    }
    command = [sys.executable, "tests/cuda/drive.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["values", "threads", "shared", "left_out", "refused"]
