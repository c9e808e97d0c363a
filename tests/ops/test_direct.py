"""Past the dispatcher or through it: the same results, the same gradients of any order; never past who listens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sw_transplant.ops import direct, toeplitz_conv
from sw_transplant.ops.toeplitz import toeplitz_weight_grad


class Subclass(Tensor):
    pass


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The way of every call: "direct" for one that runs past the dispatcher, "recorded" if autograd records it."""
    noted: list[str] = []
    recorded = direct._Recorded.apply
    monkeypatch.setattr(direct._Recorded, "apply", lambda *given: noted.append("recorded") or recorded(*given))
    for name, operator in direct._OPERATORS.items():

        def run(*given, operator=operator):
            noted.append("direct")
            return operator.run(*given)

        monkeypatch.setitem(direct._OPERATORS, name, operator._replace(run=run))
    return noted


def arguments(requires: str = "", dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], Tensor]:
    """A map, two kernels and a bias, of which those named require gradients: x, 0, 1, b."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 6, 5), "0": (3, 1, 5, 3), "1": (3, 1, 3, 5), "b": (3,)}
    made = {
        name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(name in requires)
        for name, shape in shapes.items()
    }
    return made["x"], [made["0"], made["1"]], made["b"]


def leaves(x: Tensor, weights: list[Tensor], bias: Tensor) -> list[Tensor]:
    return [tensor for tensor in (x, *weights, bias) if tensor.requires_grad]


ORIGINS = [2, 1, 1, 2]


@pytest.mark.parametrize("requires", ["x01b", "x", "0", "1b", "x1", "b"])
def test_the_same_results_and_gradients(requires: str, ways: list[str]) -> None:
    x, weights, bias = arguments(requires)
    y = toeplitz_conv(x, weights, ORIGINS, bias, True)
    assert ways[0] == "recorded"
    expected = torch.ops.sw_transplant.toeplitz_conv(x, weights, ORIGINS, bias, True)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    wanted = leaves(x, weights, bias)
    got = torch.autograd.grad(y, wanted, grad)
    assert all(map(torch.equal, got, torch.autograd.grad(expected, wanted, grad)))


def test_gradients_of_gradients() -> None:
    x, weights, bias = arguments("x01b")
    sizes = [5, 3, 3, 5]
    run = lambda x, a, b, bias: toeplitz_conv(x, [a, b], ORIGINS, bias, True)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *weights, bias))
    assert torch.autograd.gradgradcheck(run, (x, *weights, bias))
    grad = torch.randn_like(x, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, g: tuple(toeplitz_weight_grad(x, g, sizes, ORIGINS)), (x, grad))


def test_without_gradients_nothing_is_recorded(ways: list[str]) -> None:
    x, weights, bias = arguments("x01b")
    with torch.no_grad():
        assert not toeplitz_conv(x, weights, ORIGINS, bias).requires_grad
    x, weights, bias = arguments()
    y = toeplitz_conv(x, weights, ORIGINS)
    assert not y.requires_grad
    assert ways == ["direct", "direct"]
    with torch.inference_mode():
        assert torch.equal(toeplitz_conv(x, weights, ORIGINS), y)
    results = toeplitz_weight_grad(x, x, [5, 3, 3, 5], ORIGINS)
    assert [tuple(result.shape) for result in results] == [(3, 1, 5, 3), (3, 1, 3, 5)]


def test_who_listens_is_told(ways: list[str]) -> None:
    x, weights, bias = arguments()
    with FlopCounterMode(display=False):
        toeplitz_conv(x, weights, ORIGINS, bias)
    toeplitz_conv(x.as_subclass(Subclass), weights, ORIGINS, bias)
    assert toeplitz_conv(x.to("meta"), [weight.to("meta") for weight in weights], ORIGINS).is_meta
    torch.compile(lambda x: toeplitz_conv(x, weights, ORIGINS, bias), backend="eager", fullgraph=True)(x)
    assert ways == []


def test_checkpointing_and_parameters(ways: list[str]) -> None:
    x, weights, bias = arguments("x")
    parameters = [nn.Parameter(weight) for weight in weights]
    y = checkpoint(lambda x: toeplitz_conv(x, parameters, ORIGINS, bias), x, use_reentrant=False)
    y.sum().backward()
    assert ways.count("recorded") == 2
    again = [weight.detach().requires_grad_() for weight in weights]
    toeplitz_conv(x.detach(), again, ORIGINS, bias).sum().backward()
    assert all(torch.equal(p.grad, w.grad) for p, w in zip(parameters, again, strict=True))
