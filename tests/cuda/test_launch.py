"""The launcher where it cannot launch: it says so once, and the operator goes on with the reference."""

import contextlib
import sys
import warnings

import pytest
import torch

from sw_transplant.cuda import launch


@pytest.fixture(autouse=True)
def _asked_anew():
    launch.is_available.cache_clear()
    yield
    launch.is_available.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_device_it_warns_once_with_the_reason() -> None:
    with pytest.warns(RuntimeWarning, match=r"not available on cuda:0 \(\w+: .*plain PyTorch is used"):
        assert not launch.is_available(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not launch.is_available(0)


def test_without_numba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(RuntimeWarning, match=r"ModuleNotFoundError.*pip install 'numba-cuda"):
        assert not launch.is_available(0)


def test_a_driver_too_old_for_the_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda", reason="needs numba-cuda")

    def jit(*_args, **_options):
        raise RuntimeError("[222] CUDA_ERROR_UNSUPPORTED_PTX_VERSION\n  in a later line")

    monkeypatch.setattr("numba.cuda.jit", jit)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with pytest.warns(
        RuntimeWarning, match=r"\(RuntimeError: \[222\] CUDA_ERROR_UNSUPPORTED_PTX_VERSION in a later line\); plain"
    ):
        assert not launch.is_available(0)
