"""The products of the weight gradient, all lanes of a warp in lockstep, against PyTorch's gradients in float64."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")

from sw_transplant.cuda.toeplitz.gradient.settings import choose_gradient_plan
from sw_transplant.cuda.toeplitz.staging import DTYPES
from sw_transplant.ops.toeplitz_reference import toeplitz_weight_grad_reference
from tests.cuda.gradient_error import gradient_error
from tests.cuda.gradient_product import gradients
from tests.cuda.lockstep import Cutting, Lockstep
from tests.cuda.toeplitz_cases import DEVICES, LAYERS, MATHS, Layer, strips
from tests.sampling import sample

BOUNDS = {"tf32": 6e-4, "tf32x3": 5e-7, "float16": 5e-7, "bfloat16": 5e-7}  # nothing but TF32 is rounded here
SMALL = [layer for layer in LAYERS if layer.size[0] * layer.size[1] <= 28 * 28]
LARGE = [layer for layer in LAYERS if layer not in SMALL and layer.size[0] * layer.size[1] <= 96 * 96]
DIVISIONS = {
    "chosen": {},
    "one line": {"lines": (1, 1, 1), "registers": 255},
    "all lines": {"lines": (5, 5, 3), "registers": 255},
    "planes and parts": {"planes": 2, "parts": 2},
    "tiles": {"whole": (None, None), "tile": (16, 32)},
    "tiles across": {"whole": (25, None), "tile": (25, 16)},
    "tiles down": {"whole": (None, 43), "tile": (32, 43)},
}


def error(plan, x: torch.Tensor, grad: torch.Tensor, ops=Lockstep) -> float:
    """The greatest relative error of a kernel's gradient; x and grad are (B, H, W)."""
    results = [torch.from_numpy(result)[None, None] for result in gradients(plan, x, grad, ops)]
    origins = [o for kernel in plan.kernels for o in kernel.origin]
    return gradient_error(results, x[:, None], grad[:, None], [kernel.size for kernel in plan.kernels], origins)


def images(size: tuple[int, int], math: str, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1])
    x, grad = (torch.randn(batch, *size, generator=generator).to(DTYPES[math]) for _ in range(2))
    return x, grad


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize(
    "layer", [*SMALL, LAYERS[0], *(pytest.param(layer, marks=pytest.mark.exhaustive) for layer in LARGE[1:])], ids=str
)
def test_layers(layer: Layer, math: str) -> None:
    plan = layer.gradient_plan(math)
    assert error(plan, *images(layer.size, math, 1)) <= BOUNDS[math]


@pytest.mark.parametrize(
    ("division", "math"),
    sample(itertools.product(DIVISIONS, MATHS), list(zip(DIVISIONS, itertools.cycle(MATHS), strict=False))),
)
def test_divisions_of_the_work(division: str, math: str) -> None:
    layer = Layer((25, 43), strips(21, 5, (3, 3)))
    plan = layer.gradient_plan(math, **DIVISIONS[division])
    assert error(plan, *images(layer.size, math)) <= BOUNDS[math]


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("lines", [2, 3])
@pytest.mark.parametrize(
    ("sizes", "origins"),
    [
        (((7, 7),), ((3, 3),)),
        (((6, 4),), ((5, 0),)),
        (((4, 9), (9, 4)), ((0, 8), (1, 2))),
        (((2, 3), (1, 1)), ((-3, 4), (0, 0))),
        (((5, 8), (5, 8)), ((2, 1), (2, 6))),
    ],
)
def test_any_origin_along_both_axes(sizes, origins, lines: int, axis: int, math: str) -> None:
    size = (11, 13)
    plan = choose_gradient_plan(math, size, sizes, origins, DEVICES[9, 0])
    kernels = tuple(replace(kernel, axis=axis) for kernel in plan.kernels)
    plan = replace(plan, kernels=kernels, lines=(lines,) * len(sizes), planes=1, registers=255)
    assert error(plan, *images(size, math)) <= BOUNDS[math]


def test_a_kernel_beside_the_map_across_its_lines() -> None:
    size, sizes, origins = (9, 9), ((3, 3), (3, 5)), ((1, 1), (-15, 2))
    plan = choose_gradient_plan("float16", size, sizes, origins, DEVICES[9, 0])
    _, beside = gradients(plan, *images(size, "float16"))
    assert plan.kernels[1].axis == 1
    assert not beside.any()


def test_truncation_does_not_add_up_over_images() -> None:
    """float32 accuracy with three products: sums of one sign, where what is cut off has one sign, too."""
    layer = Layer((20, 24), strips(9, 3))
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.rand(24, *layer.size, generator=generator) + 0.5 for _ in range(2))
    flat = [[v for pair in pairs for v in pair] for pairs in (layer.sizes, layer.origins)]
    expected = toeplitz_weight_grad_reference(x[:, None].double(), grad[:, None].double(), *flat)
    for result, reference in zip(gradients(layer.gradient_plan("tf32x3"), x, grad, Cutting), expected, strict=True):
        assert np.abs(result / reference[0, 0].numpy() - 1).max() <= 5e-7
