"""The weight-gradient kernels: their body in Numba's CUDA simulator, and on a GPU."""

import pytest
import torch

from sw_transplant.ops.toeplitz import toeplitz_conv, toeplitz_weight_grad, weight_grad_kernel_applies
from tests.cuda import on_gpu
from tests.cuda.gradient_error import gradient_error
from tests.cuda.on_gpu import NUMBERS, bound
from tests.cuda.toeplitz_cases import MATHS
from tests.sampling import sample

SHAPES = {
    "strips": ((5, 5, 56, 56), [(51, 5), (5, 51)]),
    "many images": ((1024, 2, 14, 14), [(47, 5), (5, 47)]),
    **on_gpu.SHAPES,
}


# Words of the names of the cases.
FEW = ("smaller", "planes,", "7 x 7", "last, tiles")


@pytest.mark.early
@pytest.mark.parametrize(("options", "runs"), sample([(FEW, 4), ((), 13), (("--all",), 29)], [(FEW, 4)]))
def test_bodies_in_the_simulator(simulate, options, runs: int) -> None:
    output = simulate("simulate_toeplitz_gradient.py", *options)
    assert output.count("relative error") == runs
    assert all(f", {math}: " in output for math in MATHS)


def inputs(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """x, grad, sizes and origins."""
    shape, sizes = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    x, grad = (torch.randn(shape, generator=generator).to("cuda", dtype) for _ in range(2))
    return x, grad, [s for pair in sizes for s in pair], [o for kh, kw in sizes for o in ((kh - 1) // 2, kw // 2)]


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize(("mode", "dtype"), NUMBERS, ids=str)
    @pytest.mark.parametrize("name", SHAPES)
    def test_against_float64(self, name, mode, dtype, precision) -> None:
        precision(mode)
        x, grad, sizes, origins = inputs(name, dtype)
        assert weight_grad_kernel_applies(x, sizes, origins)
        garbage = torch.full((2**24,), float("nan"), device="cuda")
        del garbage  # the allocator hands the same memory out again: what is not written stays NaN
        results = toeplitz_weight_grad(x, grad, sizes, origins)
        assert all(result.dtype == dtype and result.is_contiguous() for result in results)
        assert gradient_error(results, x, grad, SHAPES[name][1], origins) <= bound(mode, dtype)

    @pytest.mark.parametrize(("mode", "dtype"), NUMBERS, ids=str)
    @pytest.mark.parametrize("name", ["strips", "small map", "halo, odd"])
    def test_the_same_bits_a_hundred_times(self, name, mode, dtype, precision) -> None:
        precision(mode)
        arguments = inputs(name, dtype)
        first = toeplitz_weight_grad(*arguments)
        for _ in range(100):
            assert all(map(torch.equal, toeplitz_weight_grad(*arguments), first))

    @pytest.mark.parametrize("layout", ["channels_last", "strided", "shifted"])
    def test_any_strides_and_alignment(self, layout: str) -> None:
        x, grad, sizes, origins = inputs("odd, one image", torch.float16)

        def view(tensor):
            if layout == "channels_last":
                return tensor.contiguous(memory_format=torch.channels_last)
            if layout == "strided":
                return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
            # contiguous, but begins at an address that is a multiple of two bytes only
            return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)

        results = toeplitz_weight_grad(view(x), view(grad), sizes, origins)
        assert all(map(torch.equal, results, toeplitz_weight_grad(x, grad, sizes, origins)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_on_another_stream(self, dtype) -> None:
        x, grad, sizes, origins = inputs("strips", dtype)
        expected = toeplitz_weight_grad(x * 2, grad, sizes, origins)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            doubled = x * 2  # ready only when the sleep is over
            results = toeplitz_weight_grad(doubled, grad, sizes, origins)
        stream.synchronize()
        assert all(map(torch.equal, results, expected))

    def test_captured_in_a_graph(self) -> None:
        x, grad, sizes, origins = inputs("strips", torch.float16)
        toeplitz_weight_grad(x, grad, sizes, origins)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = toeplitz_weight_grad(x, grad, sizes, origins)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, results, toeplitz_weight_grad(x, grad, sizes, origins)))

    def test_compiled_training_step(self) -> None:
        x, _, _, origins = inputs("strips", torch.float16)
        weights = [torch.randn(5, 1, *size, device="cuda").half() / 16 for size in ((51, 5), (5, 51))]
        weights = [weight.requires_grad_() for weight in weights]

        def loss(x):
            return toeplitz_conv(x * 2, weights, origins).float().square().mean()

        torch.compile(loss, fullgraph=True)(x).backward()
        compiled = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        loss(x).backward()
        for weight, grad in zip(weights, compiled, strict=True):
            torch.testing.assert_close(grad, weight.grad, rtol=2e-3, atol=2e-3 * float(weight.grad.abs().max()))

    def test_a_map_of_more_than_two_to_the_31_elements(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        shape = (700, 1000, 56, 56)  # 2.2e9 elements: positions in it do not fit 32 bits
        if free < 14 * 2**30:
            pytest.skip("needs 14 GiB of GPU memory")
        x, grad = (torch.zeros(shape, dtype=torch.float16, device="cuda") for _ in range(2))
        x[-1, -1], grad[-1, -1] = torch.randn(2, 56, 56, device="cuda").half()
        (result,) = toeplitz_weight_grad(x, grad, [7, 7], [3, 3])
        assert result[:-1].count_nonzero() == 0
        last = [tensor[-1:, -1:].contiguous() for tensor in (x, grad)]
        assert gradient_error([result[-1:]], *last, [(7, 7)], [3, 3]) <= 2e-3

    def test_the_reference_where_the_kernel_does_not_apply(self) -> None:
        x, grad = torch.randn(2, 3, 2, 9, 9, device="cuda", dtype=torch.float64)
        for given, sizes, origins in ((x, [3, 3], [1, 1]), (x.float(), [3, 3] * 5, [1, 1] * 5)):
            assert not weight_grad_kernel_applies(given, sizes, origins)
            results = toeplitz_weight_grad(given, grad.to(given.dtype), sizes, origins)
            assert gradient_error(results, given, grad, [(3, 3)] * len(results), origins) <= 2e-3
