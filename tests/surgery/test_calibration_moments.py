"""The normal equations without shifted maps equal those that shifted maps give; fits solve them."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F

from sw_transplant.layers.orders import Orders, draw_orders
from sw_transplant.surgery.calibration.assembly import Assembly
from sw_transplant.surgery.calibration.channels import each_part
from sw_transplant.surgery.calibration.compensation import Kept, all_offsets, compensate
from sw_transplant.surgery.calibration.fit import (
    error_of,
    fit_layer,
    least_possible,
    pose,
    whole_taps,
)
from sw_transplant.surgery.calibration.moments import Accumulator, Taps
from sw_transplant.surgery.calibration.orders import choose_orders
from sw_transplant.surgery.calibration.swaps import swap


def shifted(x, taps):
    """``(C, positions, P)``: what every tap that reaches the map reads."""
    (height, width), (sh, sw), far = taps.out_size, taps.stride, 64
    padded = F.pad(x, (far, far, far, far))
    read = [
        padded[:, :, far + dy : far + dy + (height - 1) * sh + 1 : sh, far + dx : far + dx + (width - 1) * sw + 1 : sw]
        for dy, dx in taps.offsets.tolist()
    ]
    return torch.stack(read, -1).transpose(0, 1).flatten(1, 3)


CASES = [  # map, stride, length, tile
    ((12, 9), (1, 1), 13, 3),
    ((5, 6), (1, 1), 13, 3),
    ((11, 14), (1, 1), 15, 5),
    ((13, 11), (2, 2), 13, 3),
    ((12, 9), (2, 3), 9, 2),
    ((12, 9), (1, 1), 8, 4),
    ((3, 3), (1, 1), 13, 5),
    ((1, 4), (1, 1), 7, 3),
    ((9, 8), (3, 2), 51, 5),
]


@pytest.mark.parametrize(("size", "stride", "length", "tile"), CASES)
def test_moments_are_those_of_shifted_maps(size, stride, length, tile):
    out = tuple((side - 1) // step + 1 for side, step in zip(size, stride, strict=True))
    taps = Taps(length, tile, size, out, stride)
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, *size, dtype=torch.float64), torch.randn(4, 3, *out, dtype=torch.float64)
    sums = Accumulator(taps)
    sums.add(x[:1], y[:1])
    sums.add(x[1:], y[1:])
    moments, maps = sums.moments(), shifted(x, taps)
    wanted = y.transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.gram, maps.mT @ maps)
    torch.testing.assert_close(moments.right, (maps.mT @ wanted[..., None])[..., 0])
    torch.testing.assert_close(moments.sums, maps.sum(1))
    passed = x[:, :, :: stride[0], :: stride[1]] - y
    torch.testing.assert_close(moments.passed, passed.square().sum((0, 2, 3)))
    assert moments.positions == maps.shape[1]
    everywhere = moments.spread(taps)
    reached = all_offsets(taps)[taps.rows_of_whole]
    assert torch.equal(reached, taps.offsets)
    assert int((everywhere.gram.abs().amax((0, 2)) > 0).sum()) <= len(taps.offsets)


def problem(channels=3, size=(9, 8), length=11, ridge=1e-3, images=30, stride=(1, 1), kernel=None, bias=0.5):
    """Least squares towards responses of a kernel over the whole strips."""
    out = tuple((side - 1) // step + 1 for side, step in zip(size, stride, strict=True))
    taps = Taps(length, 3, size, out, stride)
    torch.manual_seed(1)
    x = torch.randn(images, channels, *size, dtype=torch.float64).cumsum(2) / 2
    if kernel is None:
        kernel = torch.randn(channels, 2 * 3 * taps.whole, dtype=torch.float64)
    full = torch.zeros(channels, len(all_offsets(taps)), dtype=torch.float64)
    maps = shifted(x, taps)
    y = (maps @ kernel[:, taps.rows_of_whole, None])[..., 0] + bias  # (C, positions)
    y = y.view(channels, images, *out).transpose(0, 1)
    sums = Accumulator(taps)
    sums.add(x, y)
    merged = {}
    for number, offset in enumerate(map(tuple, all_offsets(taps).tolist())):
        merged.setdefault(offset, []).append(number)
    for numbers in merged.values():
        full[:, numbers] = kernel[:, numbers].sum(1, keepdim=True)
    energy = sum(full[:, numbers[0]].square() for numbers in merged.values())
    return pose(sums.moments().spread(taps), taps, full, energy, ridge), x, y


@pytest.mark.parametrize(("length", "tile"), [(13, 3), (8, 4), (10, 5), (7, 2)])
def test_normal_equations_are_those_of_the_taps_that_a_bank_makes(length, tile):
    """Against the matrix of the map, column by column, and tiles that are laid out one by one."""
    torch.manual_seed(0)
    taps = Taps(length, tile, (9, 9), (9, 9), (1, 1))
    tiles = taps.whole // tile
    orders, scales = draw_orders(5, tiles, 3, 1), torch.randn(5, 3, dtype=torch.float64)
    assembly, plain = Assembly(orders, taps, scales), Assembly(orders, taps)
    numbers, count = tiles * tile**2, 2 * tile * taps.whole
    units = torch.eye(numbers, dtype=torch.float64)
    matrix = torch.stack([assembly.parts(unit.expand(5, -1).contiguous()) for unit in units], 3)  # (C, 3, P, K)
    laid = torch.zeros(5, 3, count, numbers, dtype=torch.float64)
    for c, e, t, i, j in itertools.product(range(5), range(3), range(tiles), range(tile), range(tile)):
        number = (t * tile + i) * tile + j
        laid[c, 0, i * taps.whole + int(orders.horizontal[e, c, t]) * tile + j, number] += scales[c, 0]
        row = int(orders.vertical[e, c, t]) * tile + i
        laid[c, 1, tile * taps.whole + row * tile + j, number] += scales[c, 1]
        if int(orders.identity[e, c]) == t:
            laid[c, 2, taps.twins[i * tile + j, 0], number] += scales[c, 2]
    torch.testing.assert_close(matrix, laid)
    root = torch.randn(5, count, count, dtype=torch.float64)
    gram, whole = root @ root.mT, laid.sum(1)
    torch.testing.assert_close(assembly.gather(gram), laid.mT @ gram[:, None])
    torch.testing.assert_close(assembly.products(gram), gram @ whole)
    torch.testing.assert_close(assembly.normal(assembly.products(gram)), whole.mT @ gram @ whole)
    blocks = plain.by_branch(gram)
    scaled = (blocks * scales[:, :, None, None, None] * scales[:, None, :, None, None]).sum((1, 2))
    torch.testing.assert_close(scaled, whole.mT @ gram @ whole)


@pytest.fixture
def _own_threads():
    """As many threads as before, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_own_threads")
def test_threads_share_the_channels_and_nothing_else():
    seen = []

    def work(some):
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        started.wait(60)
        return some

    torch.set_num_threads(2)
    started = threading.Barrier(2)
    assert each_part(work, torch.zeros(50), 16) == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]
    assert len({thread for thread, _, _ in seen}) == 2
    assert {each[1:] for each in seen} == {(1, False)}
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        each_part(lambda some: 1 // some.start, torch.zeros(50), 16)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    seen.clear()
    started = threading.Barrier(1)
    assert len(each_part(work, torch.zeros(50), 16)) == 4
    assert set(seen) == {(threading.get_ident(), 1, False)}


@pytest.mark.usefixtures("_own_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_exact_whatever_modes_the_caller_is_in(threads):
    taps = Taps(11, 3, (9, 8), (9, 8), (1, 1))
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 40, 9, 8)
    plain, cast = Accumulator(taps), Accumulator(taps)
    plain.add(x.double(), y.double())
    torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        cast.add(x.requires_grad_(), y)
    for name, value in vars(cast.moments()).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.float64
            assert not value.requires_grad
            wanted = getattr(plain.moments(), name)
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_free_strips_reach_what_is_a_strip():
    posed, _, _ = problem(ridge=1e-9)
    assert float((least_possible(posed) / posed.energy).max()) < 1e-6


@pytest.mark.parametrize("residual", [True, False])
def test_a_bank_that_made_the_targets_is_found(residual):
    taps = Taps(11, 3, (9, 8), (9, 8), (1, 1))
    orders = draw_orders(3, 4, 2, 5)
    torch.manual_seed(2)
    bank = torch.randn(3, 36, dtype=torch.float64)
    kernel = Assembly(orders, taps).parts(bank).sum(1)
    if residual:
        kernel[:, taps.whole * -taps.across.start - taps.along.start] += 1
    posed, _, y = problem(kernel=kernel, ridge=1e-8)
    fit = fit_layer(posed, orders, residual)
    assert float(fit.error.sum() / y.square().sum()) < 1e-8
    torch.testing.assert_close(fit.bias, torch.full((3,), 0.5, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(error_of(posed, fit), fit.error, atol=1e-4, rtol=1e-3)


def test_the_error_is_that_of_the_responses():
    posed, x, y = problem()
    fit = fit_layer(posed, draw_orders(3, 4, 4, 1), True)
    maps = shifted(x, posed.taps)
    got = (maps @ whole_taps(posed, fit)[:, posed.taps.rows_of_whole, None])[..., 0] + fit.bias[:, None]
    missed = (got - y.transpose(0, 1).flatten(1)).square().sum(1)
    torch.testing.assert_close(fit.error, missed)
    torch.testing.assert_close(error_of(posed, fit), missed)


def test_no_bank_is_better_than_the_solution():
    posed, _, _ = problem()
    orders = draw_orders(3, 4, 4, 1)
    fit = fit_layer(posed, orders, True, rounds=0)
    bank = fit.bank.flatten(1).clone().requires_grad_()
    taps = Assembly(orders, posed.taps).parts(bank).sum(1)
    centre = posed.taps.whole * -posed.taps.across.start - posed.taps.along.start
    taps = torch.cat([taps[:, :centre], taps[:, centre : centre + 1] + 1, taps[:, centre + 1 :]], 1)
    objective = (
        (taps * (posed.gram @ taps[..., None])[..., 0]).sum(1) - 2 * (taps * posed.right).sum(1) + posed.constant
    )
    torch.testing.assert_close(objective, fit.objective)
    (gradient,) = torch.autograd.grad(objective.sum(), bank)
    assert float(gradient.norm()) < 1e-5 * float(posed.right.norm())
    assert bool((fit_layer(posed, orders, True, rounds=1).objective <= fit.objective).all())


def test_an_endless_ridge_is_least_squares_in_kernel_space():
    posed, _, _ = problem(ridge=1e9)
    fit = fit_layer(posed, draw_orders(3, 4, 4, 1), False, rounds=0)
    other, _, _ = problem(ridge=1e7)
    again = fit_layer(other, draw_orders(3, 4, 4, 1), False, rounds=0)
    torch.testing.assert_close(fit.bank, again.bank, rtol=1e-4, atol=1e-4)


def test_chosen_orders_help_and_are_orders():
    posed, _, _ = problem(size=(9, 9), length=12)
    orders, residual, before, after, least = choose_orders(posed, 2, 123, candidates=3, swaps=50)
    first = draw_orders(3, 4, 2, 123)
    assert bool((after <= before).all())
    assert bool((least <= after).all())
    assert float(after.sum()) < 0.95 * float(before.sum())
    places = torch.arange(4, dtype=torch.int32).expand(2, 3, 4)
    for chosen in orders[:2]:
        assert torch.equal(chosen.sort(2).values, places)
    assert not torch.equal(orders.horizontal, first.horizontal)
    torch.testing.assert_close(fit_layer(posed, orders, residual, rounds=0).objective, after)
    both = [float(fit_layer(posed, first, each, rounds=0).objective.sum()) for each in (False, True)]
    assert residual == (both[1] <= both[0])
    again = choose_orders(posed, 2, 123, candidates=3, swaps=50)
    assert all(torch.equal(a, b) for a, b in zip(orders, again.orders, strict=True))


@pytest.mark.parametrize("residual", [True, False])
def test_no_exchange_is_left_that_would_help(residual):
    """After so many tries each of 24 was tried from where it ended; here every one is, by solving its equations."""
    posed, _, _ = problem(size=(9, 9), length=12)
    generator = torch.Generator().manual_seed(0)

    def objective(orders):
        return fit_layer(posed, orders, residual, rounds=0).objective

    first = draw_orders(3, 4, 2, 5)
    start = objective(first)
    found = Orders(*(order.clone() for order in first))
    reached = swap(posed, found, residual, torch.arange(3), 800, generator)
    torch.testing.assert_close(reached, objective(found))
    assert bool((reached < start).all())
    for branch, edge, (t, u) in itertools.product((0, 1), (0, 1), itertools.combinations(range(4), 2)):
        tried = [order.clone() for order in found]
        tried[branch][edge][:, [t, u]] = found[branch][edge][:, [u, t]]
        assert bool((objective(Orders(*tried)) > reached * (1 - 1e-9)).all())


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("mix", [0.6, 1.0])
@pytest.mark.parametrize("residual", [True, False])
def test_channels_together_reach_the_least_of_their_weighted_errors(mix, stride, residual):
    posed, x, y = problem(channels=4, stride=stride, images=20)
    orders, ghosts = draw_orders(4, 4, 4, 1), (2,)
    torch.manual_seed(4)
    root = torch.randn(4, 4, dtype=torch.float64)
    weights = root @ root.T
    kept = Kept()
    kept.add(x, y)
    fit = fit_layer(posed, orders, residual)
    found = compensate(posed, fit, orders, kept.posed(posed), ghosts, weights, mix)
    made, maps, target = Assembly(orders, posed.taps, fit.scales), shifted(x, posed.taps), y.transpose(0, 1).flatten(1)
    passed = x[:, :, :: stride[0], :: stride[1]].transpose(0, 1).flatten(1)
    active = torch.tensor([[1.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    diagonal = weights.diagonal() * active[:, 0]

    def weighted(bank, bias):
        taps = made.parts(bank).sum(1)
        got = (maps @ taps[:, posed.taps.rows_of_whole, None])[..., 0] + bias[:, None] + passed * residual
        errors = active * got + (1 - active) * passed - target
        change = torch.zeros_like(taps)
        if residual:
            change[:, posed.taps.whole * -posed.taps.across.start - posed.taps.along.start] = 1
        whole = taps + change
        own = (whole * (posed.gram @ whole[..., None])[..., 0]).sum(1) - 2 * (whole * posed.right).sum(1)
        means = posed.moments.target - (posed.moments.sums * whole).sum(1) - bias * posed.moments.positions
        own = own + means.square() / posed.moments.positions
        return mix * (errors * (weights @ errors)).sum() + (1 - mix) * (diagonal * own).sum()

    bank, bias = found.bank.flatten(1).clone().requires_grad_(), found.bias.clone().requires_grad_()
    start = weighted(fit.bank.flatten(1), fit.bias)
    reached = weighted(bank, bias)
    assert float(reached.detach()) < float(start)
    step = 1e-2 * float(start - reached.detach())
    for number in range(3):  # no direction leads further down
        torch.manual_seed(number)
        for sign in (1, -1):
            moved = weighted(
                found.bank.flatten(1) + sign * 1e-2 * torch.randn_like(bank),
                found.bias + sign * 1e-3 * torch.randn_like(bias),
            )
            assert float(moved) > float(reached.detach()) - step
    gradients = torch.autograd.grad(reached, (bank, bias))
    at_start = fit.bank.flatten(1).clone().requires_grad_(), fit.bias.clone().requires_grad_()
    before = torch.autograd.grad(weighted(*at_start), at_start)
    assert float(gradients[0].norm()) < 0.05 * float(before[0].norm())
    assert float(gradients[1].norm()) < 0.05 * float(before[1].norm())
