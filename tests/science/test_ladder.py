"""The steps from SLaK to SW: what each network holds, that all of them train, and the table."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sw_transplant as sw
from sw_transplant import SWConfig, convert
from sw_transplant.cli import main
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.models.cut_borders import CutSWConv2d
from sw_transplant.science.cost import count_cost
from sw_transplant.science.ladder import LADDER, build
from sw_transplant.sparsity import sparsity_report
from tests.sampling import sample

BUILT = [name for name, step in LADDER.items() if step.model]
NOT_BUILT = [name for name in LADDER if name not in BUILT]
SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "num_classes": 5, "layer_scale_init_value": 1.0}


def small(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    tile = LADDER[name].settings.get("kernel_size", (5 if LADDER[name].model == "slak_tiny" else 3,))[-1]
    return build(name, **{**SMALL, "kernel_size": (13, 11, 9, 7, tile), **settings})


def modules_of(model: nn.Module) -> list[SWConv2d]:
    return [module for module in model.modules() if isinstance(module, SWConv2d)]


QUICK = ["sw#0", "sw#1", "sw#3", "sw#11", "sw#15", "sw#19", "sw#23", "sw#24"]  # the others differ from these by numbers


@pytest.mark.parametrize("name", sample(BUILT, QUICK))
def test_every_step_takes_a_step_of_training(name: str) -> None:
    model = small(name)
    assert model.training
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    sparsity = LADDER[name].filter_sparsity(model, total_steps=10, update_frequency=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if sparsity is not None:
        sparsity.initialise((images, labels, F.cross_entropy))
        assert sparsity_report(model).totals[-1].density < 0.99
        sparsity.attach(optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_not_built_says_why(name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name}: "):
        build(name)
    assert LADDER[name].note


def test_widths_and_ghosts_of_the_first_networks_offset_each_other() -> None:
    with torch.device("meta"):
        wide = modules_of(build("sw#11"))
        without = modules_of(build("sw#4"))
    stages = [0, 3, 6, 15]  # 3, 3, 9, 3 blocks
    assert [wide[i].in_channels for i in stages] == [124, 249, 499, 998]
    assert [len(wide[i].active) for i in stages] == [96, 192, 385, 769]
    assert all(len(module.ghosts) == 0 for module in without)
    with torch.device("meta"):
        final = modules_of(build("sw#24"))
    assert [len(final[i].active) for i in (0, 3, 6, 24)] == [60, 122, 246, 492]


def test_one_edge_is_in_order_along_rows_and_in_reverse_order_along_columns() -> None:
    for name, tile in (("sw#3", 5), ("sw#4", 5), ("sw#7", 3)):
        for module in modules_of(small(name)):
            assert (module.edges, module.tile) == (1, tile)
            count = torch.arange(module.tiles, dtype=torch.int32)
            torch.testing.assert_close(module.horizontal, count.expand_as(module.horizontal), rtol=0, atol=0)
            torch.testing.assert_close(module.vertical, count.flip(0).expand_as(module.vertical), rtol=0, atol=0)
    first = modules_of(small("sw#11"))[0]
    assert not (first.horizontal[0] == first.horizontal[1]).all()


@pytest.mark.parametrize(("edges", "tile", "length"), [(1, 5, 13), (1, 3, 9), (4, 3, 11)])
def test_cut_borders_are_responses_on_the_map_alone(edges: int, tile: int, length: int) -> None:
    """Small convolutions of the map's own size, each shifted with zeros behind it, by hand; train mode and eval."""
    torch.manual_seed(0)
    orders = "opposite" if edges == 1 else "random"
    module = CutSWConv2d(3, length, tile, edges=edges, paths=2, ghost=0, orders=orders).double()
    x = torch.randn(2, 3, 8, 7, dtype=torch.float64)
    tiles = -(-length // tile)
    z = F.conv2d(x, module.bank.reshape(-1, 1, tile, tile), padding=tile // 2, groups=3).view(2, 3, tiles, 8, 7)
    first = tile // 2 - length // 2  # where the middle of the first tile stands, from the output
    sums = {name: torch.zeros_like(x) for name in ("horizontal", "vertical", "identity")}
    for edge in range(edges):
        for channel in range(3):
            for t in range(tiles):
                for name, axis in (("horizontal", 3), ("vertical", 2)):
                    place = first + tile * int(getattr(module, name)[edge, channel, t])
                    for here in range(x.shape[axis]):
                        if 0 <= here + place < x.shape[axis]:
                            taken = z[:, channel, t].select(axis - 1, here + place)
                            sums[name][:, channel].select(axis - 1, here).add_(taken.detach())
            sums["identity"][:, channel] += z[:, channel, int(module.identity[edge, channel])].detach()
    for training in (True, False):
        module.train(training)
        wanted = x + sum(F.batch_norm(sums[name], None, None, training=True) for name in sums) if training else None
        if wanted is None:
            norms = {name: module.norm(name) for name in sums}
            wanted = x + sum(norms[n](sums[n]) for n in sums)
        torch.testing.assert_close(module(x), wanted)
    assert [set(layer.milliseconds) for layer in sw.tune(module, x).layers] == [{"shift"}]
    for call in (lambda: sw.merge(module), lambda: module.weight, lambda: module.reparameterize()):
        with pytest.raises(NotImplementedError, match=r"cut_borders=False pads them by N - 1"):
            call()
    for wrong in ({"ghost": 0.5}, {"stride": 2}, {"gain": "edge"}):
        with pytest.raises(ValueError, match="CutSWConv2d: tile=3"):
            CutSWConv2d(4, 9, 3, **{"ghost": 0, **wrong})


def test_opposite_strips_are_mirrored_kernels() -> None:
    """Along a row the tiles stand in the bank's order, along a column from the last to the first."""
    module = SWConv2d(4, 9, 3, edges=1, paths=1, ghost=0, residual=False, orders="opposite").eval().double()
    line = torch.cat([module.bank[:, t] for t in range(3)], dim=2)  # (C, 3, 9)
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    rows = F.conv2d(x, line[:, None], padding=(1, 4), groups=4)
    column = torch.cat([module.bank[:, t] for t in (2, 1, 0)], dim=1)
    columns = F.conv2d(x, column[:, None], padding=(4, 1), groups=4)
    taken = torch.stack([module.bank[c, int(module.identity[0, c])] for c in range(4)])
    identity = F.conv2d(x, taken[:, None], padding=1, groups=4)
    wanted = (rows + columns + identity) / (1 + module.norm("identity").eps) ** 0.5
    torch.testing.assert_close(module(x), wanted)
    with pytest.raises(ValueError, match="orders 'opposite' with 4 edges"):
        SWConv2d(4, 9, orders="opposite")
    with pytest.raises(ValueError, match=r"SWConfig\.orders: got 'opposite' with 4 edges"):
        SWConfig(mode="shiftwise", orders="opposite")


def test_squeeze_and_excitation_comes_with_20_and_goes_with_25() -> None:
    names = {name: set(small(name).state_dict()) for name in ("sw#19", "sw#20", "sw#24", "sw#25")}
    assert names["sw#19"] == names["sw#25"]
    assert names["sw#20"] == names["sw#24"]
    gone = {key for key in names["sw#20"] if ".se." in key}
    assert gone
    assert not any(".se." in key for key in names["sw#19"])
    assert "stages.0.0.pwconv1.weight" in names["sw#19"]
    features = build("sw#19", **SMALL, features_only=True)
    assert [tuple(m.shape[1:]) for m in features(torch.randn(1, 3, 64, 64))][-1] == (20, 2, 2)


def test_interleaved_blocks_are_those_of_unireplknet() -> None:
    model = small("sw#23", depths=(1, 2, 4, 1))
    kinds = [[type(block.large_kernel).__name__ for block in stage] for stage in model.stages]
    large, plain = "PublishedSWConv2d", "Conv2d"
    assert kinds == [[plain], [large, large], [large, plain, large, plain], [large]]


def test_the_input_is_always_added() -> None:
    assert all(module.residual for name in ("sw#3", "sw#11") for module in modules_of(small(name)))
    plain = nn.Sequential(nn.Conv2d(8, 8, 9, padding=4, groups=8, bias=False))  # no marked centre
    for wanted, config in ((True, SWConfig.preset("sw#11")), (False, SWConfig(mode="shiftwise", residual=False))):
        assert convert(plain, config)[0].residual is wanted
    kinds = {convert(plain, SWConfig(mode="shiftwise", residual=r))[0].residual for r in (True, False, "auto")}
    assert kinds == {True, False}
    with pytest.raises(ValueError, match="calibration with residual=False"):
        convert(plain, SWConfig(mode="shiftwise", residual=False), calibration=torch.randn(2, 8, 12, 12))


def test_a_network_of_the_paper_is_not_silently_left_alone() -> None:
    model = small("sw#24")
    with pytest.raises(ValueError, match=r"2 ghosts of 8 channels instead of 0; convert leaves such layers as"):
        convert(model, SWConfig.preset("sw#26"))
    with pytest.raises(ValueError, match=r"tile=3 instead of 5"):
        convert(model, SWConfig.preset("sw#6"))
    convert(model, SWConfig.preset("sw#24"))
    convert(model)
    laid_out = convert(nn.Sequential(nn.Conv2d(8, 8, 9, padding=4, groups=8)))
    with pytest.raises(ValueError, match="laid out instead of mode 'shiftwise'"):
        convert(laid_out, SWConfig(mode="shiftwise"))


def test_recipes_follow_the_steps() -> None:
    assert LADDER["sw#11"].recipe().warmup_epochs == 20
    assert LADDER["sw#11"].recipe().model == "sw_slak_tiny"
    assert LADDER["sw#24"].recipe(300).warmup_epochs == 5
    assert LADDER["sw#27"].recipe(300).pruning.sparsity == 0.2
    assert LADDER["sw#15"].recipe().pruning is None
    shares = {name: LADDER[name].recipe().pruning.sparsity for name in ("sw#11", "sw#20", "sw#23", "sw#24", "sw#25")}
    assert list(shares.values()) == [0.4, 0.4, 0.4, 0.3, 0.3]  # SLaK's up to #23 (C.1), then what Table 9 starts from


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", BUILT)
def test_every_step_at_full_size(name: str) -> None:
    model = build(name, num_classes=10)
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 3])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_counts() -> None:
    """Dense networks of both papers: SLaK's Table 3 (in blue), and SW's."""
    for name, parameters, multiplications in (("sw#0", 50.7, 8.7), ("sw#24", 31.8, 5.0)):
        with torch.device("meta"):
            cost = count_cost(build(name))
        assert cost.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
        assert cost.multiplications / 1e9 == pytest.approx(multiplications, abs=0.05)
        assert cost.parameters_in_use == cost.parameters
        assert cost.multiplications_in_use == cost.multiplications


def test_what_is_out_of_use_is_not_counted() -> None:
    model = small("sw#24")
    dense = count_cost(model, 64)
    module = modules_of(model)[0]
    for path in module.paths:
        mask = torch.ones(path.tile_count, dtype=torch.bool)
        mask[:3] = False
        path.set_mask(mask)
    sparse = count_cost(model, 64)
    weights = 3 * module.tiles * 9
    assert dense.parameters - sparse.parameters_in_use == 2 * weights
    # Form shift convolves the sum of the paths once, padded by 2, on a 16 x 16 map.
    assert dense.multiplications - sparse.multiplications_in_use == pytest.approx(weights * 18 * 18, rel=1e-6)
    assert sparse.multiplications == dense.multiplications


def test_the_table_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ladder", "--no-cost", "--json"]) == 0
    out, err = capsys.readouterr()
    steps = {step["name"]: step for step in json.loads(out)["steps"]}
    assert list(steps) == list(LADDER)
    assert steps["sw#24"]["accuracy_300"] == 83.39
    assert steps["sw#2"]["model"] is None
    assert "not built" in err
