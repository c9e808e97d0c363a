"""The first use of a kernel on a GPU: in another thread, in a backward pass, from disk, frozen and captured."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sw_transplant as sw
from sw_transplant.check.verify import TF32_BOUND
from sw_transplant.cuda import launch, storage
from sw_transplant.ops import toeplitz_selftest

pytestmark = pytest.mark.gpu
SIZE = (2, 6, 40, 40)


@pytest.fixture(autouse=True)
def _first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of the device, nothing compiled or kept."""
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", str(tmp_path))
    asked = (launch._why_not, toeplitz_selftest._why_no_kernel, *toeplitz_selftest.SELF_TESTS.values())
    known = (*asked, launch._loaded)
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


def layer() -> tuple[nn.Module, nn.Module, Tensor]:
    """A convolution, its conversion, and a map."""
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, 13, padding=6, groups=6)
    return plain.double(), sw.convert(plain).float().cuda(), torch.randn(SIZE)


def close(got: Tensor, expected: Tensor) -> bool:
    return ((got.detach().cpu().double() - expected).norm() / expected.norm()).item() <= 10 * TF32_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_another_thread_under_another_default_dtype(dtype: torch.dtype) -> None:
    plain, module, x = layer()
    results: list[Tensor] = []

    def run() -> None:
        results.append(module(x.cuda()))

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        torch.set_default_dtype(before)
    assert close(results[0], plain(x.double()))
    assert module.decision is not None
    assert module.decision.form == "toeplitz"


def test_in_a_backward_pass() -> None:
    plain, module, x = layer()
    given, expected = x.cuda().requires_grad_(), x.double().requires_grad_()
    module(given).sum().backward()  # compiles the gradients' kernels in autograd's thread
    plain(expected).sum().backward()
    assert close(given.grad, expected.grad)
    assert close(module.branches[0].layout.to_dense(module.branches[0].bank.grad), plain.weight.grad)


@torch.no_grad()
def test_within_a_capture_another_form_runs_and_nothing_is_remembered() -> None:
    plain, module, x = layer()
    module.eval()
    there = x.cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    nn.functional.conv2d(there, torch.zeros(6, 1, 13, 13, device="cuda"), groups=6)  # cuDNN's own first use
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = module(there)
    graph.replay()
    torch.cuda.synchronize()
    assert close(y, plain(x.double()))
    assert close(module(there), plain(x.double()))
    assert module.decision.form == "toeplitz"


@torch.no_grad()
def test_a_kernel_from_disk_and_a_damaged_one(tmp_path: Path) -> None:
    plain, module, x = layer()
    expected = plain(x.double())
    assert sw.warm_up(module, x.cuda()) >= 1
    kept = len(storage.entries())
    assert kept >= 1
    launch._loaded.cache_clear()
    assert sw.warm_up(module, x.cuda()) == 0
    assert close(module(x.cuda()), expected)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    launch._loaded.cache_clear()
    assert close(module(x.cuda()), expected)
    assert sum(entry.whole for entry in storage.entries()) >= 1


@torch.no_grad()
@pytest.mark.parametrize("size", [SIZE, (2, 6, 14, 14)])
def test_a_frozen_layer_in_a_graph_does_no_work_on_weights(size: tuple[int, ...]) -> None:
    plain, module, _ = layer()
    x = torch.randn(size)
    there = x.cuda()
    sw.freeze(module.eval(), there)
    module(there)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(there)
    module.branches[0].bank.mul_(2)  # the graph has the frozen kernel
    graph.replay()
    torch.cuda.synchronize()
    assert close(y, plain(x.double()))
