"""shift_add on the CPU: every implementation against the definition, bit for bit; and the identity it exists for."""

import importlib
import sys

import numba
import pytest
import torch
import torch.nn.functional as F

from sw_transplant.ops import shift_add, shift_add_backward_reference, shift_add_cpu, shift_add_reference
from tests.ops.shift_add_cases import (
    CASES,
    DTYPES,
    Case,
    assert_same_bits,
    naive_shift_add,
    naive_shift_add_backward,
)


def per_channel(placements: torch.Tensor, channels: int) -> torch.Tensor:
    """The same table, repeated for each channel: what takes the reference through its gathers."""
    return placements.expand(-1, channels, -1, -1).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    z, placements, _ = case.inputs(dtype)
    expected = naive_shift_add(z, placements, case.out_size, case.stride)
    assert expected.count_nonzero() > 0
    filled = torch.full_like(expected, float("nan"))
    shift_add_cpu.shift_add_forward(z, placements, filled, case.stride)
    assert_same_bits(filled, expected)
    assert_same_bits(shift_add(z, placements, case.out_size, case.stride), expected)
    assert_same_bits(shift_add_reference(z, placements, case.out_size, case.stride), expected)
    table = per_channel(placements, case.channels)
    assert_same_bits(shift_add_reference(z, table, case.out_size, case.stride), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    z, placements, grad = case.inputs(dtype)
    expected = naive_shift_add_backward(grad, placements, case.tiles, case.z_size, case.stride)
    assert expected.count_nonzero() > 0
    filled = torch.full_like(expected, float("nan"))
    shift_add_cpu.shift_add_backward(grad, placements, filled, case.stride)
    assert_same_bits(filled, expected)
    z.requires_grad_()
    shift_add(z, placements, case.out_size, case.stride).backward(grad)
    assert_same_bits(z.grad, expected)
    assert z.grad.is_contiguous()
    for table in (placements, per_channel(placements, case.channels)):
        result = shift_add_backward_reference(grad, table, case.tiles, case.z_size, case.stride)
        assert_same_bits(result, expected)


def test_many_threads_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    z, placements, grad = case.inputs(torch.float32)
    monkeypatch.setattr(shift_add_cpu, "WORK_OF_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    out, grad_z = torch.full_like(grad, float("nan")), torch.full_like(z, float("nan"))
    shift_add_cpu.shift_add_forward(z, placements, out, case.stride)
    shift_add_cpu.shift_add_backward(grad, placements, grad_z, case.stride)
    assert_same_bits(out, naive_shift_add(z, placements, case.out_size, case.stride))
    assert_same_bits(grad_z, naive_shift_add_backward(grad, placements, case.tiles, case.z_size, case.stride))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
@pytest.mark.parametrize("layout", ["strided", "channels_last", "expanded"])
def test_any_strides_of_z_and_of_the_gradient(layout: str, case: Case) -> None:
    z, placements, grad = case.inputs(torch.float32)
    if layout == "strided":
        views = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in (z, grad)]
    elif layout == "channels_last":
        views = [t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (z, grad)]
    else:
        views = [t[..., :1].expand_as(t) for t in (z, grad)]
    assert not any(view.is_contiguous() for view in views)
    leaf = views[0].detach().requires_grad_()
    out = shift_add(leaf, placements, case.out_size)
    assert out.is_contiguous()
    assert_same_bits(out, naive_shift_add(views[0].contiguous(), placements, case.out_size, (1, 1)))
    out.backward(views[1])
    expected = naive_shift_add_backward(views[1].contiguous(), placements, case.tiles, case.z_size, (1, 1))
    assert_same_bits(leaf.grad.contiguous(), expected)


@pytest.mark.parametrize("empty", ["batch", "rows", "branches", "tiles", "channels"])
def test_nothing_to_add(empty: str) -> None:
    sizes = {"batch": 2, "rows": 3, "branches": 2, "tiles": 4, "channels": 3} | {empty: 0}
    z = torch.randn(sizes["batch"], sizes["channels"], sizes["tiles"], 5, 5, requires_grad=True)
    placements = torch.zeros(sizes["branches"], 1, sizes["rows"], 3, dtype=torch.int32)
    out = shift_add(z, placements, (4, 3))
    assert out.shape == (sizes["branches"], sizes["batch"], sizes["channels"], 4, 3)
    if empty in ("rows", "tiles"):
        assert out.count_nonzero() == 0
    out.sum().backward()
    assert z.grad.shape == z.shape
    table = per_channel(placements, sizes["channels"])
    assert_same_bits(shift_add(z, table, (4, 3)).detach(), out.detach())
    assert_same_bits(shift_add_reference(z.detach(), table, (4, 3)), out.detach())
    grad_z = shift_add_backward_reference(torch.ones_like(out), table, sizes["tiles"], (5, 5))
    assert_same_bits(grad_z, z.grad)


def test_extreme_shifts_add_nothing() -> None:
    z = torch.ones(1, 2, 1, 4, 4)
    far = [-(2**31), -(2**31) + 1, 2**31 - 1]
    rows = [(0, y, x) for y in (0, *far) for x in (0, *far)] + [(2**31 - 1, 0, 0), (-(2**31), 0, 0)]
    placements = torch.tensor(rows, dtype=torch.int32).reshape(1, 1, -1, 3)
    for table in (placements, per_channel(placements, 2)):
        for function in (shift_add, shift_add_reference):
            assert_same_bits(function(z, table, (4, 4), (1, 1)), torch.ones(1, 1, 2, 4, 4))
        grad = shift_add_backward_reference(torch.ones(1, 1, 2, 4, 4), table, 1, (4, 4))
        assert_same_bits(grad, torch.ones_like(z))


def test_infinities_stay_where_they_are_read() -> None:
    z = torch.zeros(1, 2, 2, 3, 3)
    z[:, :, 1] = float("inf")
    grad = torch.full((1, 1, 2, 3, 3), float("inf"))
    placements = torch.tensor([[0, 0, 0], [-1, 0, 0], [1, 2, 0]], dtype=torch.int32).reshape(1, 1, 3, 3)
    for table in (placements, per_channel(placements, 2)):
        for function in (shift_add, shift_add_reference):
            out = function(z, table, (3, 3))
            assert out.isinf().sum((0, 1, 2, 4)).tolist() == [6, 0, 0]
            assert not out.isnan().any()
        grad_z = shift_add_backward_reference(grad, table, 2, (3, 3))
        assert grad_z.isinf().sum((0, 1, 4)).tolist() == [[6, 6, 6], [0, 0, 6]]
        assert not grad_z.isnan().any()


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6]], ids=str)
def test_gradients(case: Case) -> None:
    z, placements, _ = case.inputs(torch.float64)
    z = z[:1].requires_grad_()

    def function(z: torch.Tensor) -> torch.Tensor:
        return shift_add(z, placements, case.out_size, case.stride)

    assert torch.autograd.gradcheck(function, (z,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda z: function(z) ** 2, (z,), fast_mode=True)


@pytest.mark.parametrize(
    ("kernel", "tile", "size", "stride", "padding", "dilation"),
    [
        ((31, 5), 5, (14, 13), (1, 1), (15, 2), (1, 1)),
        ((13, 13), 3, (7, 7), (1, 1), (6, 6), (1, 1)),
        ((12, 9), 4, (17, 15), (2, 3), (5, 4), (1, 1)),
        ((9, 7), 3, (16, 15), (1, 2), (7, 0), (2, 2)),
    ],
    ids=["strip", "kernel beyond the map", "strides 2 and 3, even", "dilation 2"],
)
def test_large_convolution_is_small_ones_shifted(kernel, tile, size, stride, padding, dilation) -> None:
    torch.manual_seed(0)
    channels, (kh, kw), (th, tw) = 3, kernel, [-(-k // tile) for k in kernel]
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    weight = torch.randn(channels, 1, kh, kw, dtype=torch.float64)
    expected = F.conv2d(x, weight, None, stride, padding, dilation, channels)

    filled = F.pad(weight, (0, tw * tile - kw, 0, th * tile - kh))
    bank = filled.view(channels, th, tile, tw, tile).transpose(2, 3).reshape(channels * th * tw, 1, tile, tile)
    full = tuple(d * (tile - 1) for d in dilation)
    z = F.conv2d(x, bank, None, 1, full, dilation, channels)
    z = z.unflatten(1, (channels, th * tw))
    rows = [
        (t, d0 * tile * (t // tw) + full[0] - padding[0], d1 * tile * (t % tw) + full[1] - padding[1])
        for t, (d0, d1) in ((t, dilation) for t in range(th * tw))
    ]
    placements = torch.tensor(rows, dtype=torch.int32)[None, None]
    out = shift_add(z, placements, tuple(expected.shape[2:]), stride)[0]
    assert (out - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 3, 9, 9)}, r"z has shape \(2, 3, 9, 9\); expected 5 dimensions"),
        (
            {"z": torch.zeros(2, 3, 4, 9, 9, dtype=torch.int32)},
            "z has dtype torch.int32; expected one of torch.float32",
        ),
        (
            {"placements": torch.zeros(1, 5, 3, dtype=torch.int32)},
            r"placements has shape \(1, 5, 3\); expected \(K, G, P, 3\)",
        ),
        ({"placements": torch.zeros(1, 1, 5, 2, dtype=torch.int32)}, r"\(1, 1, 5, 2\); expected \(K, G, P, 3\)"),
        ({"placements": torch.zeros(1, 1, 5, 3, dtype=torch.int64)}, "torch.int64; expected torch.int32"),
        ({"placements": torch.zeros(1, 1, 5, 3, dtype=torch.int32, device="meta")}, "placements is on meta, z on cpu"),
        ({"placements": torch.zeros(1, 2, 5, 3, dtype=torch.int32)}, "G = 2 tables; expected 1 .* the 3 channels"),
        ({"out_size": (0, 4)}, r"out_size is \(0, 4\); expected two sizes"),
        ({"out_size": (4,)}, r"out_size is \(4,\); expected two sizes"),
        ({"stride": (1, 0)}, r"stride is \(1, 0\); expected two steps"),
        ({"stride": (1, 1, 1)}, r"stride is \(1, 1, 1\); expected two steps"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(change: dict, message: str) -> None:
    good = {
        "z": torch.zeros(2, 3, 4, 9, 9),
        "placements": torch.zeros(1, 1, 5, 3, dtype=torch.int32),
        "out_size": (5, 5),
        "stride": (1, 1),
    }
    shift_add(**good)
    with pytest.raises(ValueError, match=message):
        shift_add(**(good | change))


def test_the_reference_takes_over_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[2]
    z, placements, _ = case.inputs(torch.float32)
    expected = shift_add(z, placements, case.out_size)
    operator_module = importlib.import_module("sw_transplant.ops.shift_add")  # the package has a function of that name
    monkeypatch.setitem(sys.modules, "sw_transplant.ops.shift_add_cpu", None)
    monkeypatch.delattr("sw_transplant.ops.shift_add_cpu")
    operator_module._cpu_kernels.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="plain PyTorch is used"):
            out = shift_add(z, placements, case.out_size)
    finally:
        operator_module._cpu_kernels.cache_clear()
    assert_same_bits(out, expected)


def test_compiles_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def refuse_to_cache(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse_to_cache)

    def double(x):
        return 2 * x

    assert shift_add_cpu._compile(double)(3) == 6
