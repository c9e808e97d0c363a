"""Masks from the zeros of published sparse weights: what is out of use, what it costs, and training on with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.science.cost import count_cost
from sw_transplant.sparsity import FilterSparsity, sparsity_report


def sparse_weights() -> nn.Module:
    """The paper's module between a stem and a classifier; its paths hold unequally many zero filters."""
    torch.manual_seed(0)
    module = SWConv2d(8, 15, 3, edges=2, paths=2, ghost=0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        module.paths[0].weight[::4] = 0  # 10 of 40
        module.paths[1].weight[::5] = 0  # 8 of 40
        model[4].weight[0] = 0
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        loss = F.cross_entropy(
            model(torch.randn(4, 3, 8, 8, generator=generator)), torch.randint(0, 4, (4,), generator=generator)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_zero_filters_are_out_of_use() -> None:
    model = sparse_weights()
    dense = count_cost(model, 8)
    sparsity = FilterSparsity.from_weights(model)
    assert sparsity.sparsity == pytest.approx(18 / 80)
    assert [layer.in_use for layer in sparsity_report(model).layers] == [30, 32]
    cost = count_cost(model, 8)
    assert dense.parameters - cost.parameters_in_use == 18 * 9
    # Merged, a filter is zero where both paths are: 0 and 20 of each 20.
    assert dense.multiplications - cost.multiplications_in_use == 2 * 9 * 10 * 10
    assert not hasattr(model[4], "sparsity_mask")


def test_single_weights_of_other_layers_if_asked() -> None:
    model = sparse_weights()
    FilterSparsity.from_weights(model, only_L=False)
    assert model[4].sparsity_mask[0].any().item() is False
    assert model[4].sparsity_mask[1:].all()
    assert model[0].sparsity_mask.all()  # FilterSparsity gives all its layers a mask


def test_training_goes_on_and_zeros_move() -> None:
    """No initialise; and a synchronised update takes paths of unequal counts to their mean."""
    model = sparse_weights()
    masks = [path.mask for path in model[1].paths]
    assert masks == [None, None]
    sparsity = FilterSparsity.from_weights(model, update_frequency=1, sparse_gap=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.attach(optimizer)
    before = [path.mask.clone() for path in model[1].paths]
    train(model, optimizer, 1)
    assert [int(path.mask.sum()) for path in model[1].paths] == [30, 32]
    assert all(not torch.equal(old, path.mask) for old, path in zip(before, model[1].paths, strict=True))
    train(model, optimizer, 2)
    assert [int(path.mask.sum()) for path in model[1].paths] == [31, 31]


def test_zeros_can_stay_where_they_are() -> None:
    model = sparse_weights()
    sparsity = FilterSparsity.from_weights(model, only_L=False, update_frequency=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    sparsity.attach(optimizer)
    zeros = [parameter == 0 for parameter in model.parameters()]
    train(model, optimizer, 5)
    assert sparsity.steps == 5
    for parameter, zero in zip(list(model.parameters())[2:4], zeros[2:4], strict=True):  # the paths
        assert torch.equal(parameter == 0, zero)
    assert torch.equal(model[4].weight == 0, zeros[-2])


def test_weights_without_zeros_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 of 80 filters of large kernels are zero.*or try only_L=False"):
        FilterSparsity.from_weights(nn.Sequential(SWConv2d(8, 15, 3, ghost=0)))
