"""The Toeplitz kernels as they are compiled, in an interpreter of PTX, against convolutions in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda import toeplitz as kernels
from sw_transplant.cuda.intrinsics import SIMULATOR
from sw_transplant.cuda.toeplitz import launcher
from sw_transplant.cuda.toeplitz.division import Device
from sw_transplant.cuda.toeplitz.kernel import toeplitz_source
from sw_transplant.cuda.toeplitz.launcher import divide
from sw_transplant.cuda.toeplitz.plan import Plan
from sw_transplant.cuda.toeplitz.settings import choose_plan
from sw_transplant.cuda.toeplitz.staging import DTYPES
from sw_transplant.ops.toeplitz_reference import toeplitz_conv_reference
from sw_transplant.ops.toeplitz_selftest import SELF_TESTS
from tests.cuda.assembler import compile_to_ptx
from tests.cuda.lockstep import Cutting, Lockstep
from tests.cuda.ptx_machine import Machine, Program, bits_of
from tests.cuda.toeplitz_cases import Layer, Tiles, plan_of_gpu, strips
from tests.sampling import sample

pytestmark = pytest.mark.skipif(SIMULATOR, reason="the simulator compiles nothing")
SMALL = Device(1, 227 * 1024, 228 * 1024, blocks=1)  # so that a block takes several turns
BOUNDS = {"tf32": 5e-4, "tf32x3": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
QUICK = [
    (Layer((13, 11), strips(9, 3, (3, 3))), 5, None),
    (Layer((21, 19), strips(7, 3)), 1, Tiles(1, 2, 2)),
    (Layer((20, 8), strips(9, 3)), 1, Tiles(1, 2, 1, whole=True)),
]
SLOW = [
    (Layer((6, 7), strips(15, 3)), 3, None),
    (Layer((9, 10), ((7, 7),)), 2, None),
    (Layer((33, 9), strips(21, 2)), 1, None),
    (Layer((35, 21), strips(7, 3)), 1, Tiles(1, 2, 2)),
    (Layer((56, 12), ((5, 3),)), 2, Tiles(2, 2, 2)),
    (Layer((28, 28), strips(49, 5)), 2, None),
]
CASES = [(*case, math) for case in QUICK + SLOW for math in BOUNDS]


@pytest.mark.parametrize(
    ("layer", "batch", "tiles", "math"),
    sample(CASES, [(*QUICK[0], "tf32x3")]),
    ids=str,
)
def test_compiled_kernel(layer: Layer, batch: int, tiles, math: str) -> None:
    plan = layer.plan(math)
    if tiles is not None:
        plan = tiles.applied(plan, layer.size)
    assert launched(layer, plan, batch, 2)[1] <= BOUNDS[math]


@pytest.mark.parametrize(
    ("layer", "most"),
    sample(
        [(Layer((56, 56), sizes), most) for sizes, most in ((strips(51, 5), 2e-7), (((31, 31),), 2.5e-7))]
        + [(Layer((56, 56), ((51, 51),)), 3.5e-7)],
        [(Layer((56, 56), strips(51, 5)), 2e-7)],
    ),
    ids=str,
)
def test_float32_accuracy_where_tensor_cores_cut(layer: Layer, most: float) -> None:
    """Sums that are not begun anew lose 4e-6, 9e-6 and 2e-5 here."""
    plan = layer.plan("tf32x3")
    assert launched(layer, plan, plan.planes, 1, ops=Cutting, extras=False)[1] <= most


@pytest.mark.parametrize(
    ("layer", "channels", "math"),
    sample(
        [
            (layer, channels, math)
            for layer in (Layer((13, 12), strips(9, 3)), Layer((14, 16), ((7, 7),)), Layer((30, 20), strips(21, 5)))
            for channels in (3, 6, 20)
            for math in BOUNDS
        ],
        [(Layer((14, 16), ((7, 7),)), 3, "float16")],
    ),
    ids=str,
)
def test_both_memory_formats_give_the_same_bits(layer: Layer, channels: int, math: str) -> None:
    plan = layer.plan(math, channels=channels)
    out, error = launched(layer, plan, 2, channels)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error <= BOUNDS[math]
    # The same products in the same order: nothing but the staging is another one.
    same = dataclasses.replace(plan, channels_last=False, planes=1, rounds=1, vector=1)
    assert torch.equal(launched(layer, same, 2, channels)[0], out)


def launched(
    layer: Layer, plan: Plan, batch: int, channels: int, ops=Lockstep, extras: bool = True
) -> tuple[torch.Tensor, float]:
    """What a launch makes of NaN in memory, and its relative error; `extras`: with bias and residual."""
    dtype = DTYPES[plan.math]
    torch.manual_seed(0)
    layout = torch.channels_last if plan.channels_last else torch.contiguous_format
    x = torch.randn(batch, channels, *layer.size).to(dtype).contiguous(memory_format=layout)
    weights = [(torch.randn(channels, 1, *size) / 8).to(dtype) for size in layer.sizes]
    bias = torch.randn(channels).to(dtype)
    out = torch.full_like(x, float("nan"))

    machine = Machine(Program(compile_to_ptx(toeplitz_source(plan, extras, extras))), 4 * plan.shared_words, ops)
    pointers = [machine.address(bits_of(t)) for t in (x, *weights)]
    pointers += [pointers[-1]] * (5 - len(pointers))
    pointers += [machine.address(bits_of(t)) for t in (bias, out)]
    grid = divide(plan, batch, channels, layer.size, SMALL)
    machine.launch(grid.blocks, plan.threads, [*pointers, batch, channels, *layer.size, *grid.tiles, grid.turns])

    origins = [o for pair in layer.origins for o in pair]
    given = bias.double() if extras else None
    expected = toeplitz_conv_reference(x.double(), [w.double() for w in weights], origins, given, extras)
    return out, float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("channels_last", sample([False, True], [False]))
def test_self_test(channels_last: bool, one_image: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device is asked before the kernel is used: the kernel as compiled, with the plan that a GPU would get."""
    test = SELF_TESTS[False, channels_last]
    if channels_last:  # one image, since the interpreter is slow
        one_image()
    launches = []

    def launch(factory, key, grid, threads, arguments, shared_bytes):
        launches.append(key)
        arguments[6].fill_(float("nan"))
        machine = Machine(Program(compile_to_ptx(factory(*key))), shared_bytes)
        machine.launch(
            grid, threads, [machine.address(bits_of(a)) if isinstance(a, torch.Tensor) else a for a in arguments]
        )

    def plan_for(x, sizes, origins):
        return plan_of_gpu(choose_plan, x, sizes, origins, channels_last)

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setattr(launcher, "device_of", lambda index: SMALL)
    monkeypatch.setattr(kernels, "plan_for", plan_for)
    test.cache_clear()
    assert test(torch.device("cpu")) == ""
    test.cache_clear()
    assert len(launches) == 1
