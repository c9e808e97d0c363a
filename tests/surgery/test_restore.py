"""The way back gives the original tree, every name and every bit. A converted model reads the original's weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, restore
from sw_transplant.layers.sw_conv2d import SWConv2d
from tests.acceptance import randomise, shiftwise_layers
from tests.small_models import Functional, Parallel, conv, conv_bn, model_of_everything
from tests.snapshots import assert_same_model, assert_unchanged, snapshot


def test_a_copy_is_restored_and_the_model_left_as_it_was() -> None:
    converted = convert(model_of_everything())
    before = snapshot(converted)
    restored = restore(converted)
    assert_unchanged(converted, before)
    assert restored[2].inner is restored[4].inner[0]  # one layer in two places
    with torch.no_grad():
        for parameter in restored.parameters():
            parameter.zero_()
    assert_unchanged(converted, before)


def test_in_place() -> None:
    model = model_of_everything()
    converted = convert(model)
    norms = [branch.bn for branch in converted[1].inner.branches]
    assert restore(converted, inplace=True) is converted
    assert_same_model(converted, model)
    assert [part for part in converted[1].inner.modules() if isinstance(part, nn.BatchNorm2d)] == norms


def test_the_model_itself_may_be_the_layer() -> None:
    layer = conv()
    assert_same_model(restore(convert(layer)), layer)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load_state_dict"])
def test_the_way_back_outlives_copies(way: str) -> None:
    model = model_of_everything()
    converted = convert(model)
    if way == "deepcopy":
        converted = copy.deepcopy(converted)
    elif way == "pickle":
        converted = pickle.loads(pickle.dumps(converted))
    else:
        twin = convert(randomise(model_of_everything(), seed=5))
        twin.load_state_dict(converted.state_dict())
        converted = twin
    assert_same_model(restore(converted), model)


def test_what_was_trained_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(bias=True), Parallel(conv_bn(size=13), conv_bn(size=5), nn.BatchNorm2d(4)), Functional())
    converted = convert(model)
    x = torch.randn(4, 4, 15, 15)
    losses = []
    for one in (model, converted):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
        losses.append(one(x).square().mean().item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    restored = restore(converted).eval()
    torch.testing.assert_close(restored(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(restored(x), converted.eval()(x))
    assert not torch.equal(restored[0].weight, convert(conv(bias=True)).weight)
    assert int(restored[1].parts[0][1].num_batches_tracked) == 4


def test_modes_frozen_parts_dtype_and_layout_are_those_of_the_layer() -> None:
    model = nn.Sequential(conv(bias=True), Parallel(conv_bn(), conv_bn(size=5)), Functional())
    model[0].weight.requires_grad_(False)
    model[1].parts[1][1].eval()  # a frozen BatchNorm
    assert_same_model(restore(convert(model)), model)
    changed, expected = (one.eval().half().to(memory_format=torch.channels_last) for one in (convert(model), model))
    changed.requires_grad_(False)
    expected.requires_grad_(False)
    assert_same_model(restore(changed), expected)
    changed.train()
    expected.train()
    assert_same_model(restore(changed), expected)


def test_buffers_of_the_original_come_back() -> None:
    class Counting(Functional):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(1.5))
            self.register_buffer("steps", torch.tensor([3]), persistent=False)

    model = nn.Sequential(Counting()).double()
    converted = convert(model)
    assert isinstance(converted[0], ShiftwiseConv2d)
    restored = restore(converted)
    assert_same_model(restored, model)
    assert restored[0].steps.tolist() == [3]
    assert restore(converted.float())[0].scale.dtype is torch.float32
    other = copy.deepcopy(model)
    other[0].scale.fill_(2.5)
    converted.load_state_dict(other.state_dict())
    assert restore(converted)[0].scale == 2.5


# ---- what has no way back ----


def grown(model: nn.Module) -> nn.Module:
    converted = convert(model, SWConfig(edges=3))
    converted[0].branches[0].gain.data[1] = 0.1
    return converted


def masked(model: nn.Module) -> nn.Module:
    converted = convert(model)
    mask = torch.ones(converted[0].branches[0].tile_count, dtype=torch.bool)
    mask[0, 0] = False
    converted[0].branches[0].set_mask(mask)
    return converted


def reparameterized(model: nn.Module) -> nn.Module:
    converted = convert(model)
    converted[0].reparameterize()
    return converted


NO_WAY_BACK = {
    "edges": (grown, "0: branch 0 has extra edges, which have grown"),
    "mask": (masked, "0: branch 0 has a mask that leaves tiles out"),
    "shiftwise": (lambda model: convert(model, SWConfig(mode="shiftwise")), "0: it is the paper's module"),
    "reparameterized": (reparameterized, "0: it was reparameterized or built by hand"),
    "plain": (lambda model: model, "has no Shiftwise module"),
}


@pytest.mark.parametrize("case", NO_WAY_BACK)
def test_what_has_no_way_back_is_refused_and_left_alone(case: str) -> None:
    make, message = NO_WAY_BACK[case]
    converted = make(nn.Sequential(conv(), conv()))
    before = snapshot(converted)
    with pytest.raises(ValueError, match=message):
        restore(converted, inplace=True)
    assert_unchanged(converted, before)


def test_edges_that_have_not_grown_and_masks_that_leave_nothing_out_are_no_obstacle() -> None:
    model = nn.Sequential(conv(), Parallel(conv_bn(size=13), conv_bn(size=5)))
    converted = convert(model, SWConfig(edges=3))
    branch = converted[0].branches[0]
    branch.set_mask(torch.ones(branch.tile_count, dtype=torch.bool))
    assert_same_model(restore(converted), model)
    with torch.no_grad():
        branch.bank[:, -1, -1, -1] = 1  # one of the taps beyond the kernel, which are free where there are edges
    with pytest.raises(ValueError, match="0: branch 0 has grown beyond the original kernel"):
        restore(converted)


# ---- weights with the names of the original ----


def test_a_converted_model_reads_the_originals_weights() -> None:
    other = randomise(model_of_everything(), seed=5)
    for config in (SWConfig(), SWConfig(edges=2, tile=4)):
        converted = convert(model_of_everything(), config, select=["[0-5]*"])  # the others pad 'same'
        if config.edges:
            for layer in shiftwise_layers(converted).values():
                for branch in layer.branches:
                    if branch.gain is not None:
                        branch.gain.data.fill_(0.7)
        before = [parameter.data_ptr() for parameter in converted.parameters()]
        converted.load_state_dict(other.state_dict())
        assert [parameter.data_ptr() for parameter in converted.parameters()] == before
        assert_same_model(restore(converted), other)
    converted.load_state_dict(convert(other, config, select=["[0-5]*"]).state_dict())  # and its own format as before
    assert_same_model(restore(converted), other)


def test_the_weights_may_come_in_parts() -> None:
    other = randomise(model_of_everything(), seed=5)
    converted = convert(model_of_everything())
    for name, tensor in other.state_dict().items():
        report = converted.load_state_dict({name: tensor}, strict=False)
        assert report.unexpected_keys == []
    assert_same_model(restore(converted), other)


def test_weights_that_do_not_fit_are_refused() -> None:
    converted = convert(model_of_everything())
    state = model_of_everything().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.inner\.branches\.0\.bn\.weight"):
        converted.load_state_dict({name: t for name, t in state.items() if not name.endswith("parts.0.1.weight")})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.inner\.colour"):
        converted.load_state_dict({**state, "0.inner.colour": torch.ones(1)})
    wrong = {**state, "0.inner.weight": state["0.inner.weight"][..., 1:-1, 1:-1]}
    for strict in (False, True):
        with pytest.raises(RuntimeError, match=r"size mismatch for 0.inner.weight: .*\[4, 1, 5, 5\].*\[4, 1, 7, 7\]"):
            converted.load_state_dict(wrong, strict=strict)
    shared = convert(model_of_everything(), SWConfig(mode="shiftwise"), select="0.*")
    assert isinstance(shared[0].inner, SWConv2d)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.inner\.weight"):
        shared.load_state_dict(state)
