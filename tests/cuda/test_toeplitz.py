"""The Toeplitz kernels: their body in Numba's CUDA simulator, and on a GPU."""

import pytest
import torch

from sw_transplant.ops.toeplitz import kernel_applies, toeplitz_conv
from sw_transplant.ops.toeplitz_reference import toeplitz_conv_reference
from tests.cuda import on_gpu
from tests.cuda.on_gpu import NUMBERS, bound
from tests.cuda.toeplitz_cases import MATHS
from tests.sampling import sample

SHAPES = {"strips": ((2, 5, 56, 56), [(51, 5), (5, 51)]), **on_gpu.SHAPES}


# Words of the names of the cases.
FEW = ("three", "two blocks", "7 x 7", "asymmetric", "last, a halo", "pixel")


@pytest.mark.early
@pytest.mark.parametrize(("options", "runs"), sample([(FEW, 6), ((), 17), (("--all",), 60)], [(FEW, 6)]))
def test_bodies_in_the_simulator(simulate, options, runs: int) -> None:
    output = simulate("simulate_toeplitz.py", *options)
    assert output.count("relative error") == runs
    assert all(f", {math}: " in output for math in MATHS)


def inputs(name: str, dtype: torch.dtype, device: str = "cuda"):
    """x, weights, origins, bias."""
    shape, sizes = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(shape, generator=generator)
    weights = [torch.randn(shape[1], 1, *size, generator=generator) / 16 for size in sizes]
    bias = torch.randn(shape[1], generator=generator)
    tensors = [t.to(device, dtype) for t in (x, bias, *weights)]
    origins = [o for kh, kw in sizes for o in ((kh - 1) // 2, kw // 2)]
    return tensors[0], tensors[2:], origins, tensors[1]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


class TestOnAGPU:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("extras", [True, False])
    @pytest.mark.parametrize(("mode", "dtype"), NUMBERS, ids=str)
    @pytest.mark.parametrize("name", SHAPES)
    def test_against_float64(self, name, mode, dtype, extras, precision) -> None:
        precision(mode)
        x, weights, origins, bias = inputs(name, dtype)
        assert kernel_applies(x, weights, origins)
        given = bias if extras else None
        garbage = torch.full_like(x, float("nan"))
        del garbage  # the allocator hands the same memory out again: what is not written stays NaN
        out = toeplitz_conv(x, weights, origins, given, extras)
        wide = None if given is None else given.double()
        expected = toeplitz_conv_reference(x.double(), [w.double() for w in weights], origins, wide, extras)
        assert relative_error(out, expected) <= bound(mode, dtype)
        for _ in range(3):
            assert torch.equal(toeplitz_conv(x, weights, origins, given, extras), out)

    @pytest.mark.parametrize(("mode", "dtype"), NUMBERS, ids=str)
    @pytest.mark.parametrize("name", ["strips", "even kernels", "halo, odd"])
    def test_gradients(self, name, mode, dtype, precision) -> None:
        precision(mode)
        tensors = inputs(name, dtype)
        x, weights, origins, bias = tensors
        leaves = [t.requires_grad_() for t in (x, bias, *weights)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        grad = torch.randn_like(x)
        toeplitz_conv(x, weights, origins, bias, True).backward(grad)
        toeplitz_conv_reference(wide[0], wide[2:], origins, wide[1], True).backward(grad.double())
        for leaf, expected in zip(leaves, wide, strict=True):
            assert relative_error(leaf.grad, expected.grad) <= 10 * bound(mode, dtype)

    @pytest.mark.parametrize("layout", ["channels_last", "strided", "shifted"])
    def test_any_strides_and_alignment(self, layout: str) -> None:
        x, weights, origins, bias = inputs("odd, one image", torch.float16)
        if layout == "channels_last":
            view = x.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            view = torch.stack([x, x + 1], dim=-1)[..., 0]
        else:  # contiguous, but begins at an address that is a multiple of two bytes only
            view = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
        assert torch.equal(toeplitz_conv(view, weights, origins, bias), toeplitz_conv(x, weights, origins, bias))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_on_another_stream(self, dtype) -> None:
        x, weights, origins, bias = inputs("strips", dtype)
        expected = toeplitz_conv(x * 2, weights, origins, bias)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            doubled = x * 2  # ready only when the sleep is over
            out = toeplitz_conv(doubled, weights, origins, bias)
        stream.synchronize()
        assert torch.equal(out, expected)

    def test_captured_in_a_graph(self) -> None:
        x, weights, origins, bias = inputs("strips", torch.float16)
        toeplitz_conv(x, weights, origins, bias)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = toeplitz_conv(x, weights, origins, bias)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, toeplitz_conv(x, weights, origins, bias))

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled(self, mode: str) -> None:
        x, weights, origins, bias = inputs("strips", torch.float16)
        weights = [weight.requires_grad_() for weight in weights]

        def step(x):
            return toeplitz_conv(x * 2, weights, origins, bias, True).relu()

        compiled = torch.compile(step, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), step(x))

    def test_a_map_of_more_than_two_to_the_31_elements(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        shape = (700, 1000, 56, 56)  # 2.2e9 elements: positions in it do not fit 32 bits
        if free < 10 * 2**30:
            pytest.skip("needs 10 GiB of GPU memory")
        x = torch.zeros(shape, dtype=torch.float16, device="cuda")
        x[-1, -1] = torch.randn(56, 56, device="cuda").half()
        weight = torch.randn(1000, 1, 7, 7, device="cuda").half() / 8
        out = toeplitz_conv(x, [weight], [3, 3])
        last = toeplitz_conv(x[-1:, -1:].contiguous(), [weight[-1:].contiguous()], [3, 3])
        assert torch.equal(out[-1, -1], last[0, 0])
        assert out[:-1].count_nonzero() == 0

    def test_a_long_batch_and_the_reference_for_the_rest(self) -> None:
        x = torch.randn(5000, 1, 7, 7, device="cuda")
        weight = torch.randn(1, 1, 5, 5, device="cuda")
        expected = toeplitz_conv_reference(x.double(), [weight.double()], [2, 2])
        assert relative_error(toeplitz_conv(x, [weight], [2, 2]), expected) <= 2e-3
        assert not kernel_applies(x.double(), [weight.double()], [2, 2])
        assert not kernel_applies(x, [weight] * 5, [2, 2] * 5)
        five = toeplitz_conv(x, [weight] * 5, [2, 2] * 5)
        assert relative_error(five, 5 * expected) <= 2e-3
