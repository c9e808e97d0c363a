"""The gradients of `toeplitz_conv` and of `toeplitz_weight_grad`, by these two operators themselves: so of any order.

With out = conv(x, K, origins): the gradient of x is a conv of the output's gradient with K turned by half a turn, whose
origins count from the other end; that of K is weight_grad(x, grad). The latter is bilinear, hence two more convs.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sw_transplant.ops.direct import call
from sw_transplant.ops.toeplitz_formats import takes
from sw_transplant.ops.toeplitz_reference import dense_format


def _flipped_origins(sizes: Sequence[int], origins: Sequence[int]) -> list[int]:
    return [size - 1 - origin for size, origin in zip(sizes, origins, strict=True)]


def _flipped(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.flip(2, 3) for weight in weights]


def save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, origins, bias, residual = inputs
    ctx.save_for_backward(x, *weights)
    ctx.origins, ctx.residual, ctx.has_bias = list(origins), residual, bias is not None
    ctx.sizes = [size for weight in weights for size in weight.shape[2:]]


def grad_of_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, Tensor | None, None]:
    x, *weights = ctx.saved_tensors
    needs_x, needs_weights, _, needs_bias, _ = ctx.needs_input_grad
    grad = grad.contiguous(memory_format=dense_format(x))  # as the map, which is what it is where nothing is copied
    grad_x = grad_bias = None
    grad_weights: list[Tensor | None] = [None] * len(weights)
    if needs_x:
        origins = _flipped_origins(ctx.sizes, ctx.origins)
        grad_x = _conv(grad, _flipped(weights), ctx.sizes, origins, ctx.residual)
    if any(needs_weights):
        maps = x, grad
        if not takes(x, ctx.sizes, ctx.origins, gradient=True):
            maps = x.contiguous(), grad.contiguous()
        grad_weights = call("toeplitz_weight_grad", *maps, ctx.sizes, ctx.origins)
    if ctx.has_bias and needs_bias:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weights, None, grad_bias, None


def _conv(x: Tensor, weights: list[Tensor], sizes: Sequence[int], origins: Sequence[int], residual: bool) -> Tensor:
    x = x if takes(x, sizes, origins) else x.contiguous()
    return call("toeplitz_conv", x, weights, origins, None, residual)  # type: ignore[no-any-return]


def save_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, grad, sizes, origins = inputs
    ctx.save_for_backward(x, grad)
    ctx.sizes, ctx.origins = list(sizes), list(origins)


def grad_of_weight_grad(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, None, None]:
    """The gradients of the kernels are bilinear in x and grad; their gradients stand in for kernels here."""
    x, grad = ctx.saved_tensors
    origins = _flipped_origins(ctx.sizes, ctx.origins)
    grad_x = _conv(grad, _flipped(grads), ctx.sizes, origins, False)
    return grad_x, _conv(x, list(grads), ctx.sizes, ctx.origins, False), None, None
