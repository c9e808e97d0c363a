"""The weight-gradient kernels as compiled, in an interpreter of PTX, against PyTorch's gradients in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda import toeplitz as kernels
from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.toeplitz.division import Device
from sw_transplant.cuda.toeplitz.gradient import launcher
from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan
from sw_transplant.cuda.toeplitz.staging import DTYPES
from sw_transplant.ops import toeplitz as operators
from sw_transplant.ops.toeplitz_selftest import SELF_TESTS
from tests.cuda.assembler import compile_to_ptx
from tests.cuda.gradient_error import gradient_error
from tests.cuda.ptx_machine import Machine, Program, bits_of
from tests.cuda.toeplitz_cases import Layer, plan_of_gpu, strips
from tests.sampling import sample

pytestmark = pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing")
BOUNDS = {"tf32": 5e-4, "tf32x3": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
STRIPS = strips(9, 3)
HALO = {"whole": (None, None), "tile": (16, 16)}
FOUR_WARPS = {"lines": (1, 2), "together": 2, "planes": 2, "parts": 1, "registers": 128}
EIGHT_WARPS = FOUR_WARPS | {"parts": 2}
QUICK = [
    (Layer((13, 11), strips(9, 3, (3, 3))), 3, {}, "tf32"),
    (Layer((17, 17), strips(5, 2)), 3, EIGHT_WARPS, "bfloat16"),
]
SLOW = [
    (Layer((13, 11), strips(9, 3, (3, 3))), 3, {}),
    (Layer((20, 19), STRIPS), 1, HALO),
    (Layer((17, 18), STRIPS), 3, EIGHT_WARPS),
    (Layer((9, 10), strips(5, 2)), 3, FOUR_WARPS),
    (Layer((6, 7), strips(15, 3)), 5, {}),
    (Layer((9, 10), ((7, 7),)), 2, {}),
    (Layer((33, 9), strips(21, 2)), 2, {}),
    (Layer((33, 21), STRIPS), 2, {"whole": (33, None), "tile": (33, 16)}),
    (Layer((33, 21), STRIPS), 2, {"whole": (None, 21), "tile": (16, 21)}),
    (Layer((12, 30), ((5, 3), (3, 5), (3, 3), (1, 1))), 2, {}),
    (Layer((28, 28), strips(49, 5)), 2, {}),
    (Layer((56, 56), strips(51, 5)), 1, {}),
    (Layer((20, 20), ((31, 31),)), 2, {}),
]
CASES = QUICK + [pytest.param(*case, math, marks=pytest.mark.exhaustive) for case in SLOW for math in BOUNDS]


@pytest.mark.parametrize(("layer", "batch", "division", "math"), CASES, ids=str)
def test_compiled_kernel(layer: Layer, batch: int, division, math: str, interpreted: list) -> None:
    plan = layer.gradient_plan(math, **division)
    x, grad = images(layer, math, batch)
    results = launcher.toeplitz_weight_grad(x, grad, plan)
    assert len(interpreted) == 1
    error = gradient_error(results, x, grad, layer.sizes, [o for pair in layer.origins for o in pair])
    assert error <= BOUNDS[math], error


@pytest.mark.parametrize(
    ("layer", "channels", "math"),
    [
        (Layer((13, 11), strips(9, 3)), 6, "float16"),
        pytest.param(Layer((17, 18), ((7, 7),)), 3, "tf32", marks=pytest.mark.exhaustive),
        *(
            pytest.param(layer, channels, math, marks=pytest.mark.exhaustive)
            for layer in (Layer((13, 11), strips(9, 3)), Layer((30, 20), ((13, 13),)))
            for channels in (3, 6, 20)
            for math in BOUNDS
        ),
    ],
    ids=str,
)
def test_both_memory_formats_give_the_same_bits(layer: Layer, channels: int, math: str, interpreted: list) -> None:
    plan = layer.gradient_plan(math, channels=channels)
    maps = images(layer, math, 3, channels)
    views = [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps]
    results = launcher.toeplitz_weight_grad(*views, plan)
    assert gradient_error(results, *maps, layer.sizes, [o for pair in layer.origins for o in pair]) <= BOUNDS[math]
    same = replace(plan, channels_last=False, planes=1, vector=1)
    contiguous = launcher.toeplitz_weight_grad(*maps, same)
    assert len(interpreted) == 2
    for first, second in zip(results, contiguous, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)  # chunks may be others


@pytest.mark.exhaustive
def test_operator(interpreted: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """From tensors of any layout to gradients, with the plan that a GPU would get."""
    layer = Layer((9, 10), strips(5, 2))
    plan = layer.gradient_plan("float16")
    sizes, origins = ([v for pair in pairs for v in pair] for pairs in (layer.sizes, layer.origins))
    monkeypatch.setattr(operators, "_weight_grad_plan", lambda *arguments: plan)
    x, grad = images(layer, "float16", 2)
    views = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (x, grad)]
    assert not any(view.is_contiguous() for view in views)
    results = operators.toeplitz_weight_grad(*views, sizes, origins)
    assert len(interpreted) == 1
    assert [(r.dtype, r.is_contiguous()) for r in results] == [(torch.float16, True)] * 2
    assert gradient_error(results, x, grad, layer.sizes, origins) <= BOUNDS["float16"]


@pytest.mark.parametrize("channels_last", sample([False, True], [False]))
def test_self_test(
    channels_last: bool, interpreted: list, one_image: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device is asked before the kernel is used, with the plan that a GPU would get."""
    test = SELF_TESTS[True, channels_last]
    if channels_last:  # one image, since the interpreter is slow
        one_image()

    def plan_for(x, grad, sizes, origins):
        return plan_of_gpu(choose_gradient_plan, x, sizes, origins, channels_last)

    monkeypatch.setattr(kernels, "weight_grad_plan_for", plan_for)
    test.cache_clear()
    assert test(torch.device("cpu")) == ""
    test.cache_clear()
    assert len(interpreted) == 1


def images(layer: Layer, math: str, batch: int, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch, channels, *layer.size, generator=generator).to(DTYPES[math]) for _ in range(2))
    return x, grad


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list:
    """Launches run in the interpreter, from a workspace full of NaN; returns the list of them."""
    launches = []

    def launch(factory, key, grid, threads, arguments, shared_bytes):
        launches.append(key)
        arguments[2].fill_(float("nan"))
        machine = Machine(Program(compile_to_ptx(factory(*key))), shared_bytes)
        machine.launch(
            grid, threads, [machine.address(bits_of(a)) if isinstance(a, torch.Tensor) else a for a in arguments]
        )

    monkeypatch.setattr(launcher, "launch", launch)
    few = Device(1, 227 * 1024, 228 * 1024, blocks=4)  # blocks, so that one takes several turns
    monkeypatch.setattr(launcher, "device_of", lambda index: few)
    return launches
