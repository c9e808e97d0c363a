"""Fixtures of the tests of the kernels."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sw_transplant.ops import toeplitz_selftest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def simulate() -> Callable[..., str]:
    """Runs a file of this folder in Numba's CUDA simulator, a process of its own, and returns what it prints."""
    pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

    def run(name: str, *options: str) -> str:
        environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, f"tests/cuda/{name}", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture
def precision(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets how PyTorch's convolutions multiply float32."""
    return functools.partial(monkeypatch.setattr, torch.backends.cudnn.conv, "fp32_precision")


@pytest.fixture
def one_image(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Leaves one image of what kernels are tried on before their first use."""

    def cut() -> None:
        whole = toeplitz_selftest._trial

        def trial(layout: torch.memory_format) -> tuple:
            x, grad, *rest = whole(layout)
            return x[:1], grad[:1], *rest

        monkeypatch.setattr(toeplitz_selftest, "_trial", trial)

    return cut
