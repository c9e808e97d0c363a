"""The trial before a device's first use: the same answer wherever and whenever it is made, and no answer for good from
what passes."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sw_transplant.cuda.answers import Remembered
from sw_transplant.ops import toeplitz, toeplitz_formats, toeplitz_selftest
from sw_transplant.ops.toeplitz_reference import toeplitz_conv_reference, toeplitz_weight_grad_reference

CPU = torch.device("cpu")
TESTS = list(toeplitz_selftest.SELF_TESTS.values())


def exact_conv(x, weights, bias, residual, origins, out) -> None:
    """In place of the kernel: exact, and rounded once. The plan is what `plan_for` below made of the call."""
    assert {t.dtype for t in (x, out, *weights)} == {torch.float32}
    assert not x.is_inference()
    assert out.stride() == x.stride()
    out.copy_(toeplitz_conv_reference(x.double(), [weight.double() for weight in weights], origins))


def exact_weight_grad(x, grad, sizes_and_origins):
    assert {x.dtype, grad.dtype} == {torch.float32}
    return [g.float() for g in toeplitz_weight_grad_reference(x.double(), grad.double(), *sizes_and_origins)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels = pytest.importorskip("sw_transplant.cuda.toeplitz", reason="the CUDA extra is not installed")

    def flat(pairs):
        return [value for pair in pairs for value in pair]

    monkeypatch.setattr(kernels, "plan_for", lambda x, sizes, origins: flat(origins))
    monkeypatch.setattr(kernels, "weight_grad_plan_for", lambda x, grad, sizes, origins: (flat(sizes), flat(origins)))
    monkeypatch.setattr(kernels, "toeplitz_conv_forward", exact_conv)
    monkeypatch.setattr(kernels, "toeplitz_weight_grad", exact_weight_grad)
    for test in TESTS:
        test.cache_clear()
    yield
    for test in TESTS:
        test.cache_clear()


class DefaultDtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "plain": nullcontext,
    "bfloat16 by default": lambda: DefaultDtype(torch.bfloat16),  # type: ignore[dict-item, return-value]
    "float64 by default": lambda: DefaultDtype(torch.float64),  # type: ignore[dict-item, return-value]
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "meta by default": lambda: torch.device("meta"),
    "a mode of dispatch": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("test", TESTS, ids=["conv", "conv, NHWC", "gradient", "gradient, NHWC"])
def test_a_right_kernel_is_right_in_every_context(test: Callable[[torch.device], str], context: str) -> None:
    with CONTEXTS[context]():
        assert test(CPU) == ""


def test_another_thread_and_the_backward_pass() -> None:
    answers = []
    thread = threading.Thread(target=lambda: answers.append(toeplitz_selftest.self_test(CPU)))
    thread.start()
    thread.join()

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[override]
            answers.append(toeplitz_selftest.weight_grad_self_test(CPU))
            return grad

    Asks.apply(torch.zeros(2, requires_grad=True)).sum().backward()
    assert answers == ["", ""]


def test_while_a_compiler_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(toeplitz_selftest.launch, "is_available", lambda _: True)
    asked = []
    test = Remembered(lambda device: asked.append(TESTS[0](CPU)) or asked[-1])
    monkeypatch.setattr(toeplitz_selftest, "self_test", test)
    toeplitz_selftest._why_no_kernel.cache_clear()

    @torch.compile(backend="eager", fullgraph=True)
    def uses_the_answer(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if not toeplitz_selftest.why_no_kernel(0) else x - 1

    with DefaultDtype(torch.bfloat16):
        assert uses_the_answer(torch.zeros(1)).item() == 1
    assert asked == [""]
    toeplitz_selftest._why_no_kernel.cache_clear()


def test_while_a_graph_is_captured_nothing_is_tried_and_nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(toeplitz_selftest.launch, "is_available", lambda _: True)
    monkeypatch.setattr(toeplitz_selftest, "_trial", lambda layout: 1 / 0)
    toeplitz_selftest._why_no_kernel.cache_clear()
    assert "before" in toeplitz_selftest.why_no_kernel(0)
    assert toeplitz_selftest.is_left_out(torch.device("cuda", 0), False, gradient=True)
    capturing[0] = False
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        assert "ZeroDivisionError" in toeplitz_selftest.why_no_kernel(0)
    toeplitz_selftest._why_no_kernel.cache_clear()


def test_what_fails_for_want_of_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("sw_transplant.cuda.toeplitz.toeplitz_conv_forward", fail)
        with pytest.warns(RuntimeWarning, match=r"out of memory.*tried again"):
            assert "out of memory" in toeplitz_selftest.self_test(CPU)
    assert toeplitz_selftest.self_test(CPU) == ""


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device number 0 that plans are chosen for, and whose kernels are tried on the CPU."""
    from sw_transplant.cuda.toeplitz import launcher
    from tests.cuda.toeplitz_cases import DEVICES

    monkeypatch.setattr(launcher, "device_of", lambda index: DEVICES[9, 0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(toeplitz_selftest.launch, "is_available", lambda _: True)
    here = {key: lambda _, test=test: test(CPU) for key, test in toeplitz_selftest.SELF_TESTS.items()}
    monkeypatch.setattr(toeplitz_selftest, "SELF_TESTS", here)


WRONG = {  # the kernels that are wrong: (gradient, channels_last)
    "nothing": set(),
    "the conv, channels_last": {(False, True)},
    "the gradient, channels_last": {(True, True)},
    "the conv": {(False, False), (False, True)},
    "the gradient, contiguous only": {(True, False)},
}


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", WRONG)
def test_each_memory_format_falls_back_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """channels_last maps go through contiguous copies where only their kernel is wrong, and stay where both are."""
    wrong, place = WRONG[name], torch.device("cuda", 0)

    def conv(x, weights, bias, residual, origins, out) -> None:
        exact_conv(x, weights, bias, residual, origins, out)
        out.mul_(1 + 0.01 * ((False, not x.is_contiguous()) in wrong))

    def weight_grad(x, grad, sizes_and_origins):
        factor = 1 + 0.01 * ((True, not x.is_contiguous()) in wrong)
        return [factor * each for each in exact_weight_grad(x, grad, sizes_and_origins)]

    monkeypatch.setattr("sw_transplant.cuda.toeplitz.toeplitz_conv_forward", conv)
    monkeypatch.setattr("sw_transplant.cuda.toeplitz.toeplitz_weight_grad", weight_grad)
    geometry = torch.float32, 0, 24, (56, 56), (13, 5, 5, 13), (6, 2, 2, 6)
    for gradient in (False, True):
        contiguous, both = (gradient, False) in wrong, {(gradient, False), (gradient, True)}
        with pytest.warns(RuntimeWarning, match="is wrong") if wrong & both else nullcontext():
            left_out = [toeplitz_selftest.is_left_out(place, layout, gradient) for layout in (False, True)]
        assert left_out == [contiguous, bool(wrong & both)]
        copied = not toeplitz_formats.takes_channels_last(*geometry, gradient)
        assert copied == ((gradient, True) in wrong and not contiguous)


def test_where_there_are_no_kernels_maps_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toeplitz_selftest.launch, "is_available", lambda _: False)
    monkeypatch.setattr(toeplitz_selftest, "_trial", lambda layout: 1 / 0)
    assert toeplitz_formats.takes_channels_last(torch.float32, 0, 24, (56, 56), (13, 13), (6, 6))


@pytest.mark.usefixtures("_gpu")
def test_operators_called_by_themselves_leave_out_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.ops` with a map whose kernel is wrong: PyTorch's convolutions, and no copy."""
    answers = {key: lambda _, key=key: "wrong" * key[1] for key in toeplitz_selftest.SELF_TESTS}
    monkeypatch.setattr(toeplitz_selftest, "SELF_TESTS", answers)
    monkeypatch.setattr("sw_transplant.cuda.toeplitz.plan_for", lambda *_: "conv")
    monkeypatch.setattr("sw_transplant.cuda.toeplitz.weight_grad_plan_for", lambda *_: "gradient")
    x = types.SimpleNamespace(device=torch.device("cuda", 0), is_contiguous=lambda: contiguous)
    for contiguous in (True, False):
        assert toeplitz._plan(x, [], []) == ("conv" if contiguous else None)
        assert toeplitz._weight_grad_plan(x, x, [], []) == ("gradient" if contiguous else None)
