"""The shift_add kernels on a GPU: against the reference bit for bit, on other streams, in CUDA graphs, compiled."""

import pytest
import torch

pytest.importorskip("numba.cuda", reason="needs numba-cuda")

from sw_transplant.cuda import launch
from sw_transplant.cuda.shift_add import shift_add_backward, shift_add_forward
from sw_transplant.ops import shift_add, shift_add_backward_reference, shift_add_reference
from tests.ops.shift_add_cases import CASES, DTYPES, Case, assert_same_bits

pytestmark = pytest.mark.gpu

# Beside the small cases: several parts of a plane, several images to a block, many placements.
LARGE = [
    Case("stage of 56x56", 3, 24, 23, (60, 60), 3, 11, (56, 56)),
    Case("stage of 14x14", 9, 130, 21, (18, 18), 3, 10, (14, 14)),
    Case("stage of 7x7", 37, 200, 7, (11, 11), 3, 3, (7, 7)),
    Case("edges", 2, 40, 11, (32, 30), 2, 44, (28, 26), per_channel=True),
    Case("edges, stride 2", 5, 40, 11, (61, 59), 2, 44, (28, 27), stride=(2, 2), per_channel=True),
]


def test_kernels_are_available() -> None:
    assert launch.is_available(torch.cuda.current_device())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_kernels_give_the_bits_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    z, placements, grad = case.inputs(dtype)
    out, grad_z = (torch.full_like(t, float("nan"), device="cuda") for t in (grad, z))
    shift_add_forward(z.cuda(), placements.cuda(), out, case.stride)
    shift_add_backward(grad.cuda(), placements.cuda(), grad_z, case.stride)
    expected = shift_add_reference(z, placements, case.out_size, case.stride)
    expected_grad = shift_add_backward_reference(grad, placements, case.tiles, case.z_size, case.stride)
    assert_same_bits(out, expected)
    assert_same_bits(grad_z, expected_grad)
    assert_same_bits(shift_add_reference(z.cuda(), placements.cuda(), case.out_size, case.stride), expected)
    on_gpu = shift_add_backward_reference(grad.cuda(), placements.cuda(), case.tiles, case.z_size, case.stride)
    assert_same_bits(on_gpu, expected_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype) -> None:
    case = LARGE[0]
    z, placements, grad = (t.cuda() for t in case.inputs(dtype))
    z.requires_grad_()
    out = shift_add(z, placements, case.out_size, case.stride)
    out.backward(grad)
    exact = shift_add_reference(z.detach().double(), placements, case.out_size, case.stride)
    exact_grad = shift_add_backward_reference(grad.double(), placements, case.tiles, case.z_size, case.stride)
    for actual, expected in ((out, exact), (z.grad, exact_grad)):
        assert (actual.double() - expected).norm() <= torch.finfo(dtype).eps * expected.norm()


def test_on_another_stream() -> None:
    case = LARGE[0]
    z, placements, _ = (t.cuda() for t in case.inputs(torch.float32))
    expected = shift_add(2 * z, placements, case.out_size)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        doubled = torch.zeros_like(z)
        torch.cuda._sleep(100_000_000)  # a kernel on the wrong stream would read the zeros
        doubled.add_(z, alpha=2)
        out = shift_add(doubled, placements, case.out_size)
    stream.synchronize()
    assert_same_bits(out, expected)


def test_in_a_cuda_graph() -> None:
    case = LARGE[1]
    z, placements, grad = (t.cuda() for t in case.inputs(torch.float16))
    z.requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        out = shift_add(z, placements, case.out_size)
        return out, torch.autograd.grad(out, z, grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad_z = step()
    with torch.no_grad():
        z.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(out.detach(), shift_add_reference(z.detach(), placements, case.out_size))
    expected = shift_add_backward_reference(grad, placements, case.tiles, case.z_size)
    assert_same_bits(grad_z, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    case = LARGE[2]
    z, placements, grad = (t.cuda() for t in case.inputs(torch.float32))
    z.requires_grad_()
    compiled = torch.compile(lambda z: shift_add(z * 2, placements, case.out_size), fullgraph=True, mode=mode)
    for _ in range(3):
        z.grad = None
        out = compiled(z)
        out.backward(grad)
    assert_same_bits(out.detach(), shift_add_reference(2 * z.detach(), placements, case.out_size))
    assert_same_bits(z.grad, 2 * shift_add_backward_reference(grad, placements, case.tiles, case.z_size))


def test_does_not_wait_for_the_gpu() -> None:
    case = LARGE[0]
    z, placements, grad = (t.cuda() for t in case.inputs(torch.float32))
    z.requires_grad_()
    shift_add(z, placements, case.out_size).backward(grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        shift_add(z, placements, case.out_size).backward(grad)
        shift_add_reference(z.detach(), placements, case.out_size)
        shift_add_backward_reference(grad, placements, case.tiles, case.z_size)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current() -> None:
    case = LARGE[1]
    z, placements, grad = (t.to("cuda:1") for t in case.inputs(torch.float32))
    z.requires_grad_()
    out = shift_add(z, placements, case.out_size)
    out.backward(grad)
    assert torch.cuda.current_device() == 0
    assert_same_bits(out.detach(), shift_add_reference(z.detach(), placements, case.out_size))
    assert_same_bits(z.grad, shift_add_backward_reference(grad, placements, case.tiles, case.z_size))
