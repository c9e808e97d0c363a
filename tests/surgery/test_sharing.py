"""Least squares over the assembly map, against dense solves and against perturbations."""

import pytest
import torch

from sw_transplant.equivalence import assemble, grid_placements, lay_out
from sw_transplant.surgery.sharing import share


def random_orders(channels, tiles, edges, n, seed=0):
    """A vertical strip with a random order of the tiles per channel and edge: rows (tile, dy, dx), (C, E * T, 3)."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for _ in range(channels):
        places = torch.cat([torch.randperm(tiles, generator=generator) for _ in range(edges)]) * n
        which = torch.arange(tiles).repeat(edges)
        tables.append(torch.stack([which, places, torch.zeros_like(places)], dim=1))
    return torch.stack(tables).int()


def test_an_exact_layout_is_recovered_and_keeps_all_energy():
    kernel = torch.randn(3, 1, 13, 9)
    placements = grid_placements((13, 9), 5)
    bank, kept = share(kernel, lambda b: assemble(b, placements, (13, 9)), len(placements), 5)
    torch.testing.assert_close(bank, lay_out(kernel, 5)[0])
    torch.testing.assert_close(kept, torch.ones(3, dtype=torch.float64))


def test_solution_equals_a_dense_solve_channel_by_channel():
    torch.manual_seed(0)
    placements = random_orders(4, tiles=5, edges=3, n=3)
    target = torch.randn(4, 1, 15, 3, dtype=torch.float64)
    bank, kept = share(target, lambda b: assemble(b, placements, (15, 3)), 5, 3)
    for c in range(4):
        matrix = torch.stack(
            [assemble(e.reshape(1, 5, 3, 3), placements[c : c + 1], (15, 3)).flatten() for e in torch.eye(45).double()],
            1,
        )
        expected = torch.linalg.pinv(matrix) @ target[c].flatten()
        torch.testing.assert_close(bank[c].flatten(), expected)
        residual = (matrix @ expected - target[c].flatten()).square().sum() / target[c].square().sum()
        torch.testing.assert_close(kept[c], 1 - residual)
    assert kept.min() < 0.99  # where the three orders happen to add up to a singular matrix


def test_energy_outside_the_reach_of_the_tiles_counts_as_lost():
    target = torch.ones(2, 1, 9, 9)
    placements = grid_placements((9, 3), 3) + torch.tensor([0, 0, 3], dtype=torch.int32)
    bank, kept = share(target, lambda b: assemble(b, placements, (9, 9)), 3, 3)
    torch.testing.assert_close(bank, torch.ones(2, 3, 3, 3))
    torch.testing.assert_close(kept, torch.full((2,), 1 / 3, dtype=torch.float64))


def test_channels_solved_in_groups_give_the_same(monkeypatch):
    import sw_transplant.surgery.sharing as sharing

    placements = random_orders(4, tiles=3, edges=2, n=3)
    target = torch.randn(4, 1, 9, 3)
    whole = share(target, lambda b: assemble(b, placements, (9, 3)), 3, 3)
    monkeypatch.setattr(sharing, "_LARGEST_PROBLEM", 1)
    for a, b in zip(whole, share(target, lambda b: assemble(b, placements, (9, 3)), 3, 3), strict=True):
        torch.testing.assert_close(a, b)


def test_zero_kernels_and_taps_without_a_place():
    placements = torch.tensor([[0, 0, 0]], dtype=torch.int32)  # tile 1 is placed nowhere
    bank, kept = share(torch.zeros(2, 1, 3, 3), lambda b: assemble(b, placements, (3, 3)), 2, 3)
    assert torch.equal(bank, torch.zeros(2, 2, 3, 3))
    assert torch.equal(kept, torch.ones(2, dtype=torch.float64))


def test_a_map_to_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 3\), expected the target's \(2, 1, 5, 5\)"):
        share(torch.zeros(2, 1, 5, 5), lambda b: b[:, :1], 1, 3)
