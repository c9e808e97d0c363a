"""The rules of the official programs, against a few lines of NumPy that follow the same draws; averages; and masks."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

from sw_transplant import SWConfig, convert
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.models import ShiftWise, SLaK
from sw_transplant.sparsity import FilterSparsity, apply_masks, follow_masks, sparsity_report
from sw_transplant.sparsity.published import left_dense

SMALL = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "num_classes": 4, "layer_scale_init_value": 1.0}


def small_sw() -> nn.Module:
    torch.manual_seed(0)
    return ShiftWise(kernel_size=(13, 11, 9, 7, 3), **SMALL)


def small_slak() -> nn.Module:
    torch.manual_seed(0)
    return SLaK(kernel_size=(13, 11, 9, 7, 5), **SMALL)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.randint(0, 4, (4,), generator=generator)


def started(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **settings) -> tuple:
    settings = {"update_frequency": 1, "sparse_gap": 5, "dynamics": "published", "total_steps": 20, **settings}
    sparsity = FilterSparsity(model, **settings)
    sparsity.initialise((*batch(99), F.cross_entropy))
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    return sparsity.attach(optimizer), optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images, labels = batch(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def expected(used: list[np.ndarray], sums: list[np.ndarray], together: bool, rate: float, rng) -> list[np.ndarray]:
    """The official rules for one module's paths, in plain NumPy; all modules prune before any grows."""
    if together:
        used, sums = used[:1], [sum(sums)]
    pruned = []
    for mask, size in zip(used, sums, strict=True):
        count = int((~mask).sum()) + math.ceil(rate * int(mask.sum()))
        after = mask.copy().ravel()
        after[np.argsort(size.ravel(), kind="stable")[:count]] = False
        pruned.append((after.reshape(mask.shape), int(mask.sum() - after.sum())))
    return [lambda after=a, n=n: after | (rng.random(after.shape) < n / (~after).sum()) for a, n in pruned]


def test_twenty_updates_follow_the_official_rules() -> None:
    """Counts of removed, regrown and used filters, for every path; every fifth update is synchronised."""
    model = small_sw()
    sparsity, optimizer = started(model, sparsity=0.4, seed=7)
    modules = [module for module in model.modules() if isinstance(module, SWConv2d)]
    counts, wanted_counts, came_back = [], [], 0
    seen: list[list[np.ndarray]] = []
    original = sparsity._update

    def update() -> None:  # as the weights are when it begins
        for module in modules:
            sums = [path.weight.detach().abs().sum((1, 2, 3)).view(path.tile_count) for path in module.paths]
            seen.append([each.numpy() for each in sums])
        original()

    sparsity._update = update
    for number in range(1, 21):
        before = [[path.mask.numpy().copy() for path in module.paths] for module in modules]
        seen.clear()
        step(model, optimizer, number)
        rng = np.random.default_rng((7, number))
        rate = 0.005 + 0.295 * (1 + math.cos(math.pi * number / 20)) / 2
        together = number % 5 == 0
        growing = [expected(b, s, together, rate, rng) for b, s in zip(before, seen, strict=True)]
        wanted = [[grow() for grow in grows] * (2 if together else 1) for grows in growing]
        for module, masks, old in zip(modules, wanted, before, strict=True):
            for path, mask, was in zip(module.paths, masks, old, strict=True):
                now = path.mask.numpy()
                counts.append((int((was & ~now).sum()), int((~was & now).sum()), int(now.sum())))
                wanted_counts.append((int((was & ~mask).sum()), int((~was & mask).sum()), int(mask.sum())))
                came_back += int((was & now).sum() - math.floor((1 - rate) * was.sum())) > 0
                assert not path.weight.view(*path.tile_count, -1)[~path.mask].any()
    assert counts == wanted_counts
    assert came_back  # some of what was removed grew at once
    assert len({used for _, _, used in counts[::10]}) > 1  # and counts drift


def test_first_masks_are_drawn_with_a_density_for_each_path() -> None:
    model = small_sw()
    sparsity, _ = started(model, sparsity=0.4)
    report = sparsity_report(model)
    assert report.totals[0].density == pytest.approx(0.6, abs=0.1)
    masks = [layer.mask for layer in sparsity._layers]
    assert not torch.equal(masks[0], masks[1])  # parallel paths are drawn apart
    assert len({layer.density for layer in report.layers}) > 4


def test_layers_that_are_almost_dense_are_left_alone() -> None:
    model = small_sw()
    sparsity, optimizer = started(model, sparsity=0.01)
    dense = left_dense(sparsity._layers, optimizer)
    assert 0 < len(dense) < len(sparsity._layers)
    for number in range(3):
        step(model, optimizer, number)
    assert all(bool(layer.mask.all()) for layer in dense)


def test_what_was_left_alone_is_remembered_whatever_is_loaded_first() -> None:
    """A new process attaches before it loads; ranks of one run choose by the masks that they share."""
    model = small_sw()
    sparsity, optimizer = started(model, sparsity=0.01)
    step(model, optimizer, 0)
    dense = [layer.path for layer in sparsity._layers if layer in left_dense(sparsity._layers, optimizer)]
    for first, second in ((0, 1), (1, 0)):
        again = small_sw()
        later = FilterSparsity(again, update_frequency=1, dynamics="published", total_steps=20)
        other = torch.optim.AdamW(again.parameters(), lr=1e-3)
        later.attach(other)
        loads = ((again, model), (other, optimizer))
        for here, there in (loads[first], loads[second]):
            here.load_state_dict(there.state_dict())
        assert [layer.path for layer in later._layers if layer in left_dense(later._layers, other)] == dense
        mask = next(layer for layer in later._layers if layer.path not in dense).mask_in_use
        before = mask.clone()
        step(again, other, 1)
        assert not torch.equal(mask, before)


def test_moments_go_on_where_filters_are_out_of_use() -> None:
    model = small_sw()
    path = model.stages[0][0].large_kernel.paths[0]
    moments = {}
    for dynamics in ("published", "exact"):
        model = small_sw()
        _, optimizer = started(model, sparsity=0.4, dynamics=dynamics, update_frequency=1000)
        path = model.stages[0][0].large_kernel.paths[0]
        step(model, optimizer, 0)
        idle = ~path.mask.flatten()
        assert not path.weight[idle].any()
        moments[dynamics] = optimizer.state[path.weight]["exp_avg"][idle].abs().max().item()
    assert moments["exact"] == 0 < moments["published"]


def test_one_threshold_for_single_weights_of_a_slak_converted_or_not() -> None:
    """The same scores in both: the strips of the converted network have the densities of the original's."""
    densities = []
    for build in (small_slak, lambda: convert(small_slak(), SWConfig(tile=5))):
        model = build()
        sparsity, optimizer = started(model, sparsity=0.4, only_L=False)
        found = {}
        for layer in sparsity._layers:
            found[layer.path] = (int(layer.mask.sum()), int(layer.possible.sum()))
        assert sum(used for used, _ in found.values()) / sum(n for _, n in found.values()) == pytest.approx(
            0.6, abs=0.02
        )
        strips = [v for path, v in found.items() if ".large_kernel." in path]
        assert len(strips) == 12
        densities.append([used / n for used, n in strips])
        total = sum(n for _, n in strips)
        assert total == sum(8 * (2 * 5 * side + 25) for side in (13, 11, 9, 7))  # nothing beyond the kernels counts
        step(model, optimizer, 0)
        for layer in sparsity._layers:
            assert not layer.weight[~layer.mask].any()
    assert densities[0] == pytest.approx(densities[1], abs=0.1)


def test_pointwise_layers_alone_in_a_network_of_the_paper() -> None:
    sparsity = FilterSparsity(small_sw(), 0.4, only_L=False, dynamics="published")
    paths = {layer.path.split(".")[3] for layer in sparsity._layers}
    assert paths == {"pwconv1", "pwconv2"}


def test_what_it_does_not_go_with() -> None:
    for wrong in ({"init": "snip_random"}, {"growth": "gradient"}):
        with pytest.raises(ValueError, match="dynamics 'published' with init"):
            FilterSparsity(small_sw(), dynamics="published", **wrong)
    sparsity = FilterSparsity(small_sw(), dynamics="published")
    with pytest.raises(ValueError, match="dynamics 'published' works attached only"):
        sparsity.step()


# ---- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_L", [True, False])
def test_an_average_stays_as_sparse_as_the_model(only_L: bool) -> None:
    model = small_sw()
    sparsity = FilterSparsity(model, 0.5, only_L=only_L, update_frequency=1)
    sparsity.initialise((*batch(99), F.cross_entropy))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsity.attach(optimizer)
    second, third = ModelEmaV2(model, decay=0.9), follow_masks(ModelEmaV3(model, decay=0.9))
    for number in range(6):
        step(model, optimizer, number)
        second.update(model)
        third.update(model)

    def density(network: nn.Module) -> float:
        totals = sparsity_report(network).totals
        return sum(total.in_use for total in totals) / sum(total.total for total in totals)

    assert density(third.module) == pytest.approx(density(model))
    assert density(second.module) > density(model) + 0.1  # it fills up
    for group in sparsity._groups:
        for layer in group:
            averaged = third.module.get_submodule(layer.path).weight
            assert not averaged[layer.spread(~layer.mask)].any()
    with pytest.raises(ValueError, match="ModelEmaV2 averages masks like numbers"):
        follow_masks(second)
    with pytest.raises(ValueError, match="got Linear, expected timm"):
        follow_masks(nn.Linear(2, 2))


def test_masks_are_applied_to_weights() -> None:
    model = nn.Sequential(SWConv2d(8, 15, 3, ghost=0, masked=True))
    model[0].paths[0].mask[:2] = False
    apply_masks(model)
    assert not model[0].paths[0].weight[:10].any()
    assert model[0].paths[0].weight[10:].all()
