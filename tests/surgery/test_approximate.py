"""Mode shiftwise: kernels that the shared bank can make come back exactly, the others as close as it can."""

import json

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, inspect_model, load, merge, save, summary
from sw_transplant.equivalence import lay_out
from sw_transplant.layers.sw_conv2d import SWConv2d
from tests.small_models import Parallel, Residual, conv, conv_bn


def config(**changes):
    return SWConfig(**{"mode": "shiftwise", "tile": 3, "edges": 2, "ghost": 0.0, **changes})


def reachable(channels=8, length=15, edges=2, seed=123):
    """Plain convolutions (two strips) that a module of the paper with these orders equals."""
    torch.manual_seed(1)
    module = SWConv2d(channels, length, 3, edges=edges, ghost=0.0, seed=seed, dtype=torch.float64).eval()
    for path in module.paths:
        nn.init.normal_(path.weight)
    nn.init.normal_(module.norm("vertical").bias)
    return merge(module).eval()


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


x = torch.randn(2, 8, 17, 15, dtype=torch.float64)


@pytest.mark.parametrize("form", ["shift", "assembled"])
@pytest.mark.parametrize("paths", [1, 3])
def test_kernels_within_reach_are_recovered(paths, form):
    plain = reachable()
    converted = convert(nn.Sequential(plain), config(paths=paths, form=form))
    assert isinstance(converted[0], SWConv2d)
    assert len(converted[0].paths) == paths
    assert converted[0].spec.energy_kept == pytest.approx(1, abs=1e-12)
    assert error(converted(x), plain(x)) < 1e-10


def test_paths_start_different_so_that_they_can_part():
    first, second = convert(nn.Sequential(reachable()), config())[0].paths
    assert (first.weight - second.weight).abs().mean() > 0.01


def test_other_orders_keep_only_a_part_and_no_bank_keeps_more():
    torch.manual_seed(0)
    plain = reachable()
    converted = convert(nn.Sequential(plain), config(seed=7))
    module, kept = converted[0], converted[0].spec.energy_kept
    assert 0.2 < kept < 0.95
    original = convert(plain)

    def missed():
        return (module.weight - original.weight).square().sum() / original.weight.square().sum()

    assert missed().item() == pytest.approx(1 - kept, rel=1e-6)  # what the report says is what the kernels say
    with torch.no_grad():
        for _ in range(5):
            step = 1e-3 * torch.randn_like(module.paths[0].weight)
            module.paths[0].weight += step
            assert missed() > 1 - kept
            module.paths[0].weight -= step


def test_the_channels_that_lose_least_become_ghosts_and_stay_in_place():
    plain = convert(nn.Sequential(reachable()))[0]
    with torch.no_grad():
        for branch in plain.branches:
            branch.bank[[2, 5]] = 0
            if branch.bias is not None:
                branch.bias[[2, 5]] = 0
        centre = plain.branches[0]
        kh, kw = centre.geometry.kernel_size
        kernel = centre.bank.new_zeros(2, 1, kh, kw)
        kernel[:, :, kh // 2, kw // 2] = 1  # channels 2 and 5 pass the map on as it is
        centre.bank[[2, 5]] = lay_out(kernel, centre.bank.shape[-1])[0]
    original = merge(plain).eval()
    converted = convert(nn.Sequential(original), config(ghost=0.25, seed=5))
    module = converted[0]
    assert module.spec.ghosts == (2, 5)
    y = converted(x)
    assert torch.equal(y[:, [2, 5]], x[:, [2, 5]])
    torch.testing.assert_close(original(x)[:, [2, 5]], x[:, [2, 5]])


def test_square_kernels_keep_their_cross_shaped_part():
    layer = conv(8, 13, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :, 5:8, 5:8] = torch.randn(8, 1, 3, 3)  # the centre: within the reach of both strips
    module = convert(nn.Sequential(layer), config(edges=4))[0]
    assert module.spec.energy_kept > 0.5
    dense = convert(nn.Sequential(conv(8, 13)), config(edges=4))[0]
    assert 0 < dense.spec.energy_kept < 0.5


def test_batch_norms_of_the_original_are_folded():
    model = Residual(Parallel(conv_bn(8, 13), conv_bn(8, 5))).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_var.uniform_(0.5, 2)
    module = convert(model, config()).inner
    bias = convert(model).inner.bias
    torch.testing.assert_close(module.norm("identity").bias, bias)


def test_layers_that_cannot_be_shared_are_reported():
    model = nn.Sequential(
        nn.Conv2d(8, 16, 7, padding=3, groups=8),
        conv(8, 8, padding="same"),
        conv(8, padding=0),
        conv(8, 7, stride=2),
        Parallel(conv_bn(8, 13), conv_bn(8, 5)),
        conv(2, 7),
    )
    model[4].parts[1][1] = nn.BatchNorm2d(8, track_running_stats=False)
    inspection = inspect_model(model, config(ghost=0.25))
    assert [match.path for match in inspection.matches] == ["3"]
    reasons = {skipped.path: skipped.reason for skipped in inspection.skipped}
    assert "8 -> 16" in reasons["0"]
    assert "keeps the size" in reasons["1"]
    assert "keeps the size" in reasons["2"]
    assert "parts.1.1 has no running statistics" in reasons["4"]
    assert reasons["5"] == "ghost 0.25 leaves none of its 2 channels; lower it"
    convert(model, config(ghost=0.25))


def test_parameters_are_announced_as_they_come_to_be():
    model = nn.Sequential(conv(8, 13))
    (match,) = inspect_model(model, config(ghost=0.25)).matches
    assert match.parameters_after == sum(p.numel() for p in convert(model, config(ghost=0.25)).parameters())


def test_summary_tells_the_energy_kept():
    converted = convert(nn.Sequential(conv(8, 13)), config())
    assert f"{converted[0].spec.energy_kept:.1%}" in summary(converted)


@pytest.mark.parametrize("masked", [False, True])
def test_save_and_load(tmp_path, masked):
    model = nn.Sequential(conv(8, 13), Residual(conv(8, 9))).double()
    converted = convert(model, config(ghost=0.25, form="shift")).eval()
    if masked:
        for module in converted.modules():
            if isinstance(module, SWConv2d):
                for path in module.paths:
                    path.set_mask(torch.rand(path.tile_count) > 0.3)
    save(converted, tmp_path)
    loaded = load(nn.Sequential(conv(8, 13), Residual(conv(8, 9))).double(), tmp_path).eval()
    assert torch.equal(loaded(x), converted(x))
    assert [m.spec for m in loaded.modules() if isinstance(m, SWConv2d)] == [converted[0].spec, converted[1].inner.spec]


def test_a_damaged_description_is_refused(tmp_path):
    save(convert(nn.Sequential(conv(8, 13)), config()), tmp_path)
    path = tmp_path / "sw_config.json"
    description = json.loads(path.read_text())
    description["layers"][0]["shared"].pop("ghosts")
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"not the description of a shiftwise layer"):
        load(nn.Sequential(conv(8, 13)), tmp_path)


def test_masks_of_laid_out_layers_are_saved_and_loaded(tmp_path):
    converted = convert(nn.Sequential(conv(8, 13))).eval()
    branch = converted[0].branches[0]
    branch.set_mask(torch.rand(branch.tile_count) > 0.3)
    save(converted, tmp_path)
    loaded = load(nn.Sequential(conv(8, 13)), tmp_path).eval()
    assert torch.equal(loaded(x.float()), converted(x.float()))


def test_converting_twice_changes_nothing_and_merge_folds():
    converted = convert(nn.Sequential(conv(8, 13)).double(), config(ghost=0.25)).eval()
    module = converted[0]
    assert convert(converted, config(ghost=0.25), inplace=True)[0] is module
    merged = merge(converted)
    assert not any(isinstance(part, ShiftwiseConv2d) for part in merged.modules())
    assert error(merged(x), converted(x)) < 1e-12
