"""toeplitz_conv and toeplitz_weight_grad as operators: the definition, gradients, registration, compilation, errors."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from sw_transplant.ops import toeplitz_selftest
from sw_transplant.ops.toeplitz import toeplitz_conv, toeplitz_weight_grad
from sw_transplant.ops.toeplitz_reference import pairs, toeplitz_conv_reference, toeplitz_weight_grad_reference
from tests.sampling import sample

OPERATORS = torch.ops.sw_transplant
GEOMETRIES = {
    "strips": ((6, 5), [(7, 3), (3, 7), (3, 3)], [3, 1, 1, 3, 1, 1]),
    "kernel beyond the map": ((3, 4), [(9, 5)], [4, 2]),
    "even, off centre": ((5, 7), [(4, 2), (2, 6)], [3, 0, 0, 5]),
    "outside the map": ((4, 4), [(2, 3), (1, 1)], [-3, 4, 0, 0]),
}


def inputs(name: str, dtype=torch.float64, batch=2, channels=3):
    """x, weights, origins and bias."""
    size, sizes, origins = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    weights = [torch.randn(channels, 1, *s, generator=generator, dtype=torch.float64) for s in sizes]
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    return x.to(dtype), [w.to(dtype) for w in weights], origins, bias.to(dtype)


def definition(x, weights, origins, bias, residual):
    """One element of the output at a time."""
    out = torch.zeros_like(x) if bias is None else bias[:, None, None].expand_as(x).clone()
    height, width = x.shape[2:]
    for weight, (top, left) in zip(weights, pairs(origins), strict=True):
        for h in range(height):
            for w in range(width):
                for i in range(weight.shape[2]):
                    for j in range(weight.shape[3]):
                        row, column = h + i - top, w + j - left
                        if 0 <= row < height and 0 <= column < width:
                            out[:, :, h, w] += weight[:, 0, i, j] * x[:, :, row, column]
    return out + x if residual else out


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_definition(name: str, extras: bool) -> None:
    x, weights, origins, bias = inputs(name)
    given = bias if extras else None
    expected = definition(x, weights, origins, given, extras)
    for function in (toeplitz_conv, toeplitz_conv_reference):
        out = function(x, weights, origins, given, extras)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_same_padding_is_conv2d() -> None:
    x, weights, _, bias = torch.randn(2, 4, 9, 8), [torch.randn(4, 1, 5, 7)], None, torch.randn(4)
    expected = F.conv2d(x, weights[0], bias, padding=(2, 3), groups=4)
    torch.testing.assert_close(toeplitz_conv(x, weights, [2, 3], bias), expected)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients(name: str) -> None:
    x, weights, origins, bias = inputs(name, batch=1, channels=2)
    arguments = [tensor.requires_grad_() for tensor in (x, bias, *weights)]

    def function(x, bias, *weights):
        return toeplitz_conv(x, weights, origins, bias, True)

    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: function(*a) ** 2, arguments, fast_mode=True)


def test_gradients_of_the_weight_gradient() -> None:
    x, weights, origins, _ = inputs("strips", batch=1, channels=2)
    sizes = [s for weight in weights for s in weight.shape[2:]]
    arguments = (x.requires_grad_(), torch.randn_like(x).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, g: toeplitz_weight_grad(x, g, sizes, origins), arguments, fast_mode=True)


def test_only_the_gradients_that_are_wanted() -> None:
    x, weights, origins, bias = inputs("strips")
    weights[1].requires_grad_()
    toeplitz_conv(x, weights, origins, bias).sum().backward()
    assert weights[0].grad is None
    sizes = [s for weight in weights for s in weight.shape[2:]]
    expected = toeplitz_weight_grad_reference(x, torch.ones_like(x), sizes, origins)[1]
    torch.testing.assert_close(weights[1].grad, expected)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_any_strides(layout: str) -> None:
    x, weights, origins, bias = inputs("strips")
    if layout == "channels_last":
        view = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        view = torch.stack([x, x + 1], dim=-1)[..., 0]
    else:
        view = x[..., :1].expand_as(x)
    assert not view.is_contiguous()
    out = toeplitz_conv(view, weights, origins, bias, True)
    assert out.is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    torch.testing.assert_close(out, definition(view.contiguous(), weights, origins, bias, True))


@pytest.mark.parametrize("empty", [0, 1])
def test_no_images_or_no_channels(empty: int) -> None:
    sizes = [2, 3]
    sizes[empty] = 0
    x = torch.randn(*sizes, 4, 5, requires_grad=True)
    weight = torch.randn(sizes[1], 1, 3, 3, requires_grad=True)
    out = toeplitz_conv(x, [weight], [1, 1], torch.zeros(sizes[1]))
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["strips", "even, off centre"])
def test_operators_are_registered_as_pytorch_expects(name: str, dtype: torch.dtype) -> None:
    x, weights, origins, bias = inputs(name, dtype)
    sizes = [s for weight in weights for s in weight.shape[2:]]
    leaves = [weight.requires_grad_() for weight in weights]
    for first in (x, x.contiguous(memory_format=torch.channels_last)):
        arguments = (first.detach().requires_grad_(), leaves, origins, bias.requires_grad_(), True)
        torch.library.opcheck(OPERATORS.toeplitz_conv.default, arguments)
        arguments = (first.detach().requires_grad_(), torch.randn_like(x), sizes, origins)
        torch.library.opcheck(OPERATORS.toeplitz_weight_grad.default, arguments)


@pytest.mark.parametrize("backend", sample(["aot_eager", "inductor"], ["aot_eager"]))
def test_compiled_with_a_batch_that_changes(backend: str) -> None:
    _, weights, origins, bias = inputs("strips", torch.float32)
    weights = [weight.requires_grad_() for weight in weights]
    compiles = 0

    def count(graph, _):
        nonlocal compiles
        compiles += 1
        return graph.forward

    def step(x):
        return toeplitz_conv(x * 2, weights, origins, bias, True)

    counted = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 6, 5, requires_grad=True)
        compiled(x).sum().backward()
        grads = [x.grad, *(weight.grad for weight in weights)]
        x.grad = None
        for weight in weights:
            weight.grad = None
        out = step(x)
        out.sum().backward()
        torch.testing.assert_close(grads, [x.grad, *(weight.grad for weight in weights)])
        torch.testing.assert_close(counted(x).detach(), out.detach())
        for weight in weights:
            weight.grad = None
    assert compiles == 1


def test_autocast_casts_as_conv2d_does() -> None:
    x, weights, origins, bias = inputs("strips", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = toeplitz_conv(x, weights, origins, bias, True)
    assert out.dtype == torch.bfloat16
    cast = [t.bfloat16() for t in (x, bias, *weights)]
    assert torch.equal(out, toeplitz_conv(cast[0], cast[2:], origins, cast[1], True))


def test_inference_mode_and_meta_tensors() -> None:
    x, weights, origins, bias = inputs("strips", torch.float16)
    with torch.inference_mode():
        assert toeplitz_conv(x, weights, origins, bias).is_inference()
    out = toeplitz_conv(x.to("meta"), [w.to("meta") for w in weights], origins)
    assert out.shape == x.shape
    assert out.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5, 5)}, r"x has shape \(3, 5, 5\); expected 4 dimensions"),
        ({"x": torch.zeros(2, 3, 5, 5, dtype=torch.int32)}, "x has dtype torch.int32; expected one of torch.float32"),
        ({"origins": [1, 1, 1]}, "got 1 kernels and 3 origins"),
        ({"weights": [], "origins": []}, "got 0 kernels"),
        ({"weights": [torch.zeros(4, 1, 3, 3)]}, r"weights\[0\] has shape \(4, 1, 3, 3\); .* C = 3"),
        ({"weights": [torch.zeros(3, 1, 0, 3)]}, r"weights\[0\] has shape \(3, 1, 0, 3\)"),
        ({"weights": [torch.zeros(3, 1, 3, 3).half()]}, r"weights\[0\] is torch.float16 on cpu; expected"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\); expected \(3,\)"),
        ({"bias": torch.zeros(3, device="meta")}, "bias is torch.float32 on meta; expected torch.float32 on cpu"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(change: dict, message: str) -> None:
    good = {"x": torch.zeros(2, 3, 5, 5), "weights": [torch.zeros(3, 1, 3, 3)], "origins": [1, 1]}
    toeplitz_conv(**good)
    with pytest.raises(ValueError, match=message):
        toeplitz_conv(**(good | change))


def right_conv(x, weights, bias, residual, plan, out):
    """In place of the kernel's launcher: the reference. The plan is what `plan_for` below made of the call."""
    sizes, origins = plan
    assert [tuple(weight.shape[2:]) for weight in weights] == sizes
    out.copy_(toeplitz_conv_reference(x, weights, [value for pair in origins for value in pair], bias, residual))


def right_weight_grad(x, grad, plan):
    _, *geometry = plan  # the gradient comes before sizes and origins
    return toeplitz_weight_grad_reference(x, grad, *([value for pair in pairs for value in pair] for pairs in geometry))


def wrong(launch, change):
    """A launcher whose results are changed."""

    def run(*arguments):
        results = launch(*arguments)
        for result in arguments[-1:] if results is None else results:
            change(result)
        return results

    return run


@pytest.mark.parametrize(
    ("self_test", "planner", "name", "right"),
    [
        (toeplitz_selftest.self_test, "plan_for", "toeplitz_conv_forward", right_conv),
        (toeplitz_selftest.weight_grad_self_test, "weight_grad_plan_for", "toeplitz_weight_grad", right_weight_grad),
        (toeplitz_selftest.self_test_channels_last, "plan_for", "toeplitz_conv_forward", right_conv),
    ],
)
def test_a_device_with_wrong_results_is_found_out(monkeypatch, self_test, planner: str, name: str, right) -> None:
    kernels = pytest.importorskip("sw_transplant.cuda.toeplitz", reason="the CUDA extra is not installed")
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for plan_for, launch, problem in (
        (lambda x, *plan: plan, right, ""),
        (lambda x, *plan: plan, wrong(right, lambda result: result.mul_(1.01)), "is wrong"),
        (lambda x, *plan: plan, wrong(right, lambda result: result.div_(0)), "is wrong"),
        (lambda x, *plan: plan, lambda *arguments: 1 / 0, "ZeroDivision"),
        (lambda x, *plan: None, lambda *arguments: 1 / 0, ""),  # nothing to run, nothing wrong
    ):
        self_test.cache_clear()
        monkeypatch.setattr(kernels, planner, plan_for)
        monkeypatch.setattr(kernels, name, launch)
        with pytest.warns(RuntimeWarning, match=problem) if problem else contextlib.nullcontext():
            told = self_test(cpu)
        assert problem in told
        assert bool(told) == bool(problem)
        assert self_test(cpu) == told  # and no second warning
        if right is right_weight_grad:
            assert toeplitz_selftest.is_left_out(cpu, False, gradient=True) == bool(problem)
    self_test.cache_clear()


def test_an_old_gpu_is_told_so_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    toeplitz_selftest._why_no_kernel.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.0, not 7\.5") as caught:
        assert toeplitz_selftest.why_no_kernel(0) == toeplitz_selftest.why_no_kernel(0) != ""
    assert len(caught) == 1
    toeplitz_selftest._why_no_kernel.cache_clear()
