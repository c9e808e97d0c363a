"""How far gradients of kernels are from PyTorch's in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sw_transplant.ops.toeplitz_reference import toeplitz_weight_grad_reference


def gradient_error(
    results: Sequence[Tensor], x: Tensor, grad: Tensor, sizes: Sequence[tuple[int, int]], origins: Sequence[int]
) -> float:
    """The greatest relative error of a kernel's gradient. A few products may cancel each other: what the error is
    relative to is how large they are, the root of the sum of their squares."""
    flat = [size for pair in sizes for size in pair]
    x, grad = x.double(), grad.double()
    expected = toeplitz_weight_grad_reference(x, grad, flat, origins)
    squares = toeplitz_weight_grad_reference(x**2, grad**2, flat, origins)
    assert [tuple(result.shape) for result in results] == [tuple(value.shape) for value in expected]
    errors = [(a.double() - b).norm() / c.sum().sqrt() for a, b, c in zip(results, expected, squares, strict=True)]
    return float(torch.stack(errors).max())
