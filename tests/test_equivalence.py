"""The laid-out equivalence, bit for bit, and the assembly of placements that overlap."""

import pytest
import torch
import torch.nn.functional as F

from sw_transplant.equivalence import (
    assemble,
    assembly_index,
    choose_tile,
    gather_kernel,
    grid_placements,
    inverse_index,
    lay_out,
    regather_kernel,
    support,
)

SIZES = [(51, 5), (5, 51), (7, 7), (13, 13), (31, 31), (1, 11), (11, 1), (4, 6), (8, 8), (3, 3), (1, 1)]


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 7, 60])
@pytest.mark.parametrize("size", SIZES)
def test_assemble_is_the_bit_exact_inverse_of_lay_out(size, tile):
    kernel = torch.randn(4, 1, *size)
    kernel[0, 0, 0, 0] = -0.0  # a sum would lose the sign
    bank, placements = lay_out(kernel, tile)
    tiles = -(-size[0] // tile) * -(-size[1] // tile)
    assert bank.shape == (4, tiles, tile, tile)
    assert placements.shape == (tiles, 3)
    assert placements.dtype == torch.int32
    assert torch.equal(bits(assemble(bank, placements, size)), bits(kernel))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_kept(dtype):
    kernel = torch.randn(2, 1, 9, 4).to(dtype)
    bank, placements = lay_out(kernel, 4)
    assert bank.dtype == dtype
    assert torch.equal(bits(assemble(bank, placements, (9, 4))), bits(kernel))


def test_filling_is_zero_and_support_is_the_rest():
    bank, placements = lay_out(torch.ones(3, 1, 51, 5), 4)
    inside = support(placements, bank.shape[1], 4, (51, 5))
    assert inside.sum() == 51 * 5
    assert torch.equal(bank, inside.expand_as(bank).to(bank.dtype))


def overlapping(channels, tiles=4, tile=3, rows=9):
    bank = torch.randn(channels, tiles, tile, tile, dtype=torch.float64)
    placements = torch.stack(
        [torch.randint(-1, tiles, (channels, rows)), *(torch.randint(-2, 9, (channels, rows)) for _ in range(2))],
        dim=-1,
    )
    return bank, placements.int()


def test_overlapping_placements_per_channel_add_up():
    torch.manual_seed(0)
    bank, placements = overlapping(3)
    expected = torch.zeros(3, 20, 20, dtype=torch.float64)
    for channel in range(3):
        for tile, dy, dx in placements[channel].tolist():
            if tile >= 0:
                expected[channel, dy + 5 : dy + 8, dx + 5 : dx + 8] += bank[channel, tile]
    kernel = assemble(bank, placements, (8, 7))
    torch.testing.assert_close(kernel[:, 0], expected[:, 5:13, 5:12], rtol=0, atol=1e-14)


@pytest.mark.parametrize("shared", [True, False])
def test_assembly_is_differentiable(shared):
    bank, placements = overlapping(2)
    index = assembly_index(placements[:1] if shared else placements, 4, 3, (8, 7))
    assert torch.autograd.gradcheck(lambda b: gather_kernel(b, index, (8, 7)), bank.requires_grad_())


def test_assembled_kernel_convolves_like_the_original():
    torch.manual_seed(0)
    kernel, x = torch.randn(6, 1, 13, 9, dtype=torch.float64), torch.randn(2, 6, 20, 17, dtype=torch.float64)
    again = assemble(*lay_out(kernel, 5), (13, 9))
    assert torch.equal(F.conv2d(x, again, groups=6), F.conv2d(x, kernel, groups=6))


def test_choose_tile():
    chosen = {
        size: choose_tile(size) for size in [(51, 5), (5, 51), (7, 7), (13, 13), (51, 3), (1, 11), (31, 31), (3, 3)]
    }
    assert chosen == {(51, 5): 5, (5, 51): 5, (7, 7): 4, (13, 13): 5, (51, 3): 3, (1, 11): 1, (31, 31): 5, (3, 3): 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lay_out(torch.zeros(4, 2, 7, 7), 3), r"\(4, 2, 7, 7\), expected \(C_out, 1, kh, kw\)"),
        (lambda: lay_out(torch.zeros(7, 7), 3), "expected"),
        (lambda: lay_out(torch.zeros(4, 1, 7, 7), 0), "tile 0, expected at least 1"),
        (lambda: assemble(torch.zeros(4, 2, 3, 2), torch.zeros(2, 3).int(), (7, 7)), r"expected \(C, T, n, n\)"),
        (lambda: assemble(torch.zeros(4, 2, 3, 3), torch.zeros(2, 4).int(), (7, 7)), r"expected \(P, 3\)"),
        (lambda: assemble(torch.zeros(4, 2, 3, 3), torch.zeros(3, 2, 3).int(), (7, 7)), "for 3 channels, expected"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("kernel", "tile"), [((8, 7), 3), ((9, 6), 3), ((5, 5), 5), ((1, 1), 4)])
def test_a_gather_with_an_inverse_is_the_same_with_the_same_gradients(kernel: tuple[int, int], tile: int) -> None:
    tiles = -(-kernel[0] // tile) * -(-kernel[1] // tile)
    placements = grid_placements(kernel, tile)
    index = assembly_index(placements, tiles, tile, kernel)
    inverse = inverse_index(index, tiles * tile * tile)
    assert inverse is not None
    assert inverse.gaps == (False, kernel[0] % tile > 0 or kernel[1] % tile > 0)
    bank = torch.randn(3, tiles, tile, tile, dtype=torch.float64, requires_grad=True)
    got, expected = regather_kernel(bank, index, inverse, kernel), gather_kernel(bank, index, kernel)
    assert torch.equal(got, expected)
    grad = torch.randn_like(got)
    assert torch.equal(*(torch.autograd.grad(kernel, bank, grad)[0] for kernel in (got, expected)))
    assert torch.autograd.gradgradcheck(lambda b: regather_kernel(b, index, inverse, kernel).square(), bank)


def test_no_inverse_where_taps_meet_or_go_twice() -> None:
    twice = torch.tensor([[0, 0, 0], [0, 0, 2]], dtype=torch.int32)
    assert inverse_index(assembly_index(twice, 1, 2, (2, 4)), 4) is None  # one tile in two places
    meeting = torch.tensor([[0, 0, 0], [1, 0, 1]], dtype=torch.int32)
    assert inverse_index(assembly_index(meeting, 2, 2, (2, 3)), 8) is None
    gap = torch.tensor([[0, 0, 0], [-1, 0, 0]], dtype=torch.int32)
    inverse = inverse_index(assembly_index(gap, 1, 2, (2, 3)), 4)
    assert inverse is not None
    assert inverse.gaps == (True, False)
    bank = torch.randn(2, 1, 2, 2, requires_grad=True)
    kernel = regather_kernel(bank, assembly_index(gap, 1, 2, (2, 3)), inverse, (2, 3))
    assert torch.equal(kernel, F.pad(bank, (0, 1)))
    kernel.sum().backward()
    assert torch.equal(bank.grad, torch.ones_like(bank))
