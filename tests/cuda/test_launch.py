"""The launcher where it cannot launch: it says so once, with what to do, and the operators go on in plain PyTorch."""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sw_transplant.cuda import driver, launch
from sw_transplant.cuda.answers import Passing, Remembered, is_passing

pytestmark = pytest.mark.usefixtures("_asked_anew")


@pytest.fixture
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", "")
    launch._why_not.cache_clear()
    launch._loaded.cache_clear()
    yield
    launch._why_not.cache_clear()
    launch._loaded.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that everything can be loaded onto."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(driver, "enter", lambda _: None)
    monkeypatch.setattr(driver, "load", lambda *_: "a kernel")


def failing(error: Exception):
    def fail(*_arguments, **_options):
        raise error

    return fail


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_device_it_warns_once_with_the_reason() -> None:
    with pytest.warns(RuntimeWarning, match=r"not available on cuda:0 \(\w+: .*plain PyTorch is used"):
        assert not launch.is_available(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not launch.is_available(0)


@pytest.mark.usefixtures("device")
def test_without_numba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(RuntimeWarning, match=r"ModuleNotFoundError.*They need Numba.*pip install 'numba-cuda"):
        assert not launch.is_available(0)


@pytest.mark.usefixtures("device")
def test_all_kernels_are_imported_before_the_answer_is_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda", reason="needs numba-cuda")
    assert launch.is_available(0)
    launch._why_not.cache_clear()
    launch._loaded.cache_clear()
    # What Numba's own CUDA target says in the place of numba-cuda.
    monkeypatch.setitem(sys.modules, "sw_transplant.cuda.toeplitz.gradient.kernel", None)
    with pytest.warns(RuntimeWarning, match=r"gradient\.kernel.*plain PyTorch"):
        assert not launch.is_available(0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ModuleNotFoundError("No module named 'numba.cuda.core'", name="numba.cuda.core"), "_numba_cuda_redirector"),
        (
            AttributeError("module 'numpy' has no attribute 'row_stack'"),
            r"numba-cuda [\d.]+, .*'numpy<2.5'",
        ),
        (RuntimeError("cuLibraryLoadData: CUDA_ERROR_UNSUPPORTED_PTX_VERSION"), "matches the driver"),
    ],
    ids=["another target", "NumPy", "old driver"],
)
def test_a_reason_comes_with_its_remedy(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda", reason="needs numba-cuda")
    monkeypatch.setattr("sw_transplant.cuda.compiler.compile_job", failing(error))
    with pytest.warns(RuntimeWarning, match=remedy) as caught:
        assert not launch.is_available(0)
    assert not launch.is_available(0)
    assert len(caught) == 1


@pytest.mark.usefixtures("device")
def test_a_numpy_without_row_stack_is_found_before_the_first_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda", reason="needs numba-cuda")
    if not hasattr(np, "row_stack"):
        pytest.skip("NumPy has none, and Numba is loaded")
    compiled = importlib.import_module("numba.cuda").compile_ptx

    def compile_ptx(*arguments, **options):
        assert np.row_stack  # which numba-cuda asks for at its first compilation in a process
        return compiled(*arguments, **options)

    monkeypatch.setattr("numba.cuda.compile_ptx", compile_ptx)
    monkeypatch.delattr(np, "row_stack")
    with pytest.warns(RuntimeWarning, match=r"row_stack.*pip install 'numpy<2.5'"):
        assert not launch.is_available(0)


@pytest.mark.usefixtures("device")
def test_what_passes_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda", reason="needs numba-cuda")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cuModule: CUDA_ERROR_OUT_OF_MEMORY")):
        with monkeypatch.context() as patch:
            patch.setattr("sw_transplant.cuda.compiler.compile_job", failing(error))
            with pytest.warns(RuntimeWarning, match="tried again"):
                assert not launch.is_available(0)
        assert launch.is_available(0)
        launch._why_not.cache_clear()
        launch._loaded.cache_clear()


def test_lasting_answers_are_remembered() -> None:
    asked = []

    @Remembered
    def why(subject: int) -> str:
        asked.append(subject)
        if len(asked) < 3:
            raise Passing("later")
        return "no"

    assert [why(0), why(0), why(0), why(0), why(1)] == ["later", "later", "no", "no", "no"]
    assert asked == [0, 0, 0, 1]
    assert is_passing(RuntimeError("cuLibraryLoadData: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"))
    assert is_passing(MemoryError())
    assert not is_passing(RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION"))
