"""Sparse networks saved and loaded, as a user does: filters and weights that were out of use stay so."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import sw_transplant as sw
from sw_transplant.models import load_checkpoint
from sw_transplant.sparsity import FilterSparsity, sparsity_report

KERNELS = {"slak_tiny": (13, 11, 9, 7, 5), "sw_tiny": (13, 11, 9, 7, 3)}


def network(name: str = "slak_tiny") -> nn.Module:
    torch.manual_seed(0)
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "width_factor": 1.0, "num_classes": 4}
    return timm.create_model(name, kernel_size=KERNELS[name], layer_scale_init_value=1.0, **small)


def sparse_slak() -> nn.Module:
    """Zeros where published weights have some: five taps of strips, and single weights of other layers."""
    slak = network()
    with torch.no_grad():
        for stage in slak.stages:
            large = stage[0].large_kernel
            large.LoRA1.conv.weight[::2, :, :5] = 0
            large.LoRA2.conv.weight[1::2, :, :, 5:10] = 0
            stage[0].pwconv1.weight[:, ::3] = 0
    return slak


def train(model: nn.Module, sparsity: FilterSparsity | None, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    if sparsity is not None:
        sparsity.attach(optimizer)
    model.train()
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        images, labels = torch.randn(4, 3, 64, 64, generator=generator), torch.randint(0, 4, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of kernels and matrices; biases and norms begin with zeros that are none."""
    return {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.ndim > 1}


def assert_zeros_stay(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert sum(int(zero.sum()) for zero in before.values()) > 500
    for name, parameter in model.named_parameters():
        if name in before:
            assert not parameter[before[name]].any(), name


@pytest.mark.parametrize("only_L", [True, False])
def test_a_converted_sparse_slak_stays_sparse_through_a_folder(only_L: bool, tmp_path: Path) -> None:
    """Convert, fine-tune with the zeros fixed, save; load in another program, and train on."""
    converted = sw.convert(sparse_slak())
    sparsity = FilterSparsity.from_weights(converted, only_L=only_L, update_frequency=None)
    before = {
        name: zero
        for name, zero in zeros(converted).items()
        if not only_L or ("bank" in name and "branches.2" not in name)
    }
    train(converted, sparsity)
    assert_zeros_stay(converted, before)

    sw.save(converted, tmp_path / "sparse")
    loaded = sw.load(network(), tmp_path / "sparse")
    assert sparsity_report(loaded).to_dict() == sparsity_report(converted).to_dict()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(images), converted.eval()(images), rtol=0, atol=0)
    if only_L:  # filters need nothing more: their masks are part of the layers
        train(loaded, None)
    else:
        train(loaded, FilterSparsity.from_weights(loaded, only_L=False, update_frequency=None))
    assert_zeros_stay(loaded, before)

    answers = loaded.eval()(images)
    torch.testing.assert_close(sw.merge(loaded, inplace=True)(images), answers, rtol=1e-4, atol=1e-5)


def test_single_weights_of_published_dynamics_come_back_with_the_branches(tmp_path: Path) -> None:
    """There the strips of a converted SLaK are masked weight by weight, with masks beside the banks."""
    converted = sw.convert(network())
    sparsity = FilterSparsity(converted, 0.4, only_L=False, dynamics="published")
    sparsity.initialise((torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]), F.cross_entropy))
    train(converted, sparsity)
    sw.save(converted, tmp_path / "sparse")
    loaded = sw.load(network(), tmp_path / "sparse")
    found, wanted = sparsity_report(loaded).to_dict(), sparsity_report(converted).to_dict()
    assert found == wanted
    assert wanted["totals"][-1]["density"] == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize(("name", "only_L"), [("sw_tiny", True), ("slak_tiny", False)])
def test_a_checkpoint_of_a_sparse_training_is_read_with_its_masks(name: str, only_L: bool, tmp_path: Path) -> None:
    """As examples/train_imagenet.py writes it; a plain network of the name reads it."""
    model = network(name)
    sparsity = FilterSparsity(model, 0.4, only_L=only_L)
    sparsity.initialise((torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]), F.cross_entropy))
    train(model, sparsity)
    torch.save({"model": model.state_dict(), "epoch": 0}, tmp_path / "checkpoint.pth")
    read = network(name)
    load_checkpoint(read, tmp_path / "checkpoint.pth")
    torch.testing.assert_close(dict(read.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert sparsity_report(read).to_dict() == sparsity_report(model).to_dict()

    state = dict(model.state_dict())
    mask = next(key for key in state if key.endswith("mask"))
    state[mask] = state[mask][:1]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=f"1 unexpected: {mask}"):
        load_checkpoint(network(name), tmp_path / "wrong.pth")
