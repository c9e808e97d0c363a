"""The paper's module against a slow reading of its definition, and everything that may happen to such a module."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import nn

from sw_transplant import ShiftwiseConv2d, merge
from sw_transplant.check.verify import BOUNDS
from sw_transplant.forms import Call, prepare_shift
from sw_transplant.geometry import BranchGeometry
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.orders import BRANCHES, active_channels, draw_orders
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.merge import ChannelOrder, ParallelConv2d
from tests.sampling import sample

FORMS = ["shift", "assembled"]
EXACT = BOUNDS[torch.float64]
TABLES = [f"{name}_{table}" for name in BRANCHES for table in ("placements", "index")]


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def build(channels=7, length=11, tile=3, seed=5, **settings):
    """A module in float64 whose every number is random."""
    torch.manual_seed(seed)
    module = SWConv2d(channels, length, tile, seed=seed, dtype=torch.float64, **{"ghost": 0.3, **settings})
    with torch.no_grad():
        for path in module.paths:
            path.weight.normal_()
            if path.mask is not None:
                path.mask.copy_(torch.rand(path.mask.shape) < 0.6)
        if module.gain is not None:
            module.gain.normal_()
        for branch in BRANCHES:
            bn = module.norm(branch)
            for tensor in (bn.weight, bn.bias, bn.running_mean):
                tensor.normal_()
            bn.running_var.uniform_(0.5, 2)
    return module


def slow(module, x):
    """The definition, one tile of one channel at a time. Shares nothing with the module but its numbers."""
    n, (sh, sw) = module.tile, module.stride
    out = (-(-x.shape[2] // sh), -(-x.shape[3] // sw))
    far = module.length + 2 * n + 2
    sums = {branch: [] for branch in BRANCHES}
    for i, c in enumerate(module.active.tolist()):
        maps = {branch: x.new_zeros(x.shape[0], *out) for branch in BRANCHES}
        for t in range(module.tiles):
            tile = 0
            for path in module.paths:
                if path.mask is None or path.mask[i, t]:
                    tile = tile + path.weight[i * module.tiles + t]
            if isinstance(tile, int):
                continue
            # response (h, w) is that of the filter whose first tap lies at (h - far, w - far) of the map
            z = F.conv2d(F.pad(x[:, c : c + 1], [far] * 4), tile[None])[:, 0]

            def read(y0, x0, z=z):
                rows, columns = far + y0 + sh * torch.arange(out[0]), far + x0 + sw * torch.arange(out[1])
                return z[:, rows][:, :, columns]

            for e in range(module.edges):
                gains = [1.0] * 3 if module.gain is None else [g if g.dim() == 0 else g[i] for g in module.gain[:, e]]
                along, beside = -(module.length // 2), -(n // 2)
                h, v = int(module.horizontal[e, i, t]), int(module.vertical[e, i, t])
                maps["horizontal"] = maps["horizontal"] + gains[0] * read(beside, along + n * h)
                maps["vertical"] = maps["vertical"] + gains[1] * read(along + n * v, beside)
                if int(module.identity[e, i]) == t:
                    maps["identity"] = maps["identity"] + gains[2] * read(beside, beside)
        for branch in BRANCHES:
            sums[branch].append(maps[branch])
    strided = x[:, :, ::sh, ::sw]
    y = sum(module.norm(branch)(torch.stack(sums[branch], 1)) for branch in BRANCHES)
    if module.residual:
        y = y + strided[:, module.active]
    passed = [c for c in range(module.in_channels) if c not in module.active.tolist()]
    if module.ghosts_last:
        return torch.cat([y, strided[:, passed]], 1)
    whole = [None] * module.in_channels
    for k, c in enumerate(module.active.tolist()):
        whole[c] = y[:, k]
    for c in passed:
        whole[c] = strided[:, c]
    return torch.stack(whole, 1)


CASES = {
    "plain": {},
    "as published": {"ghosts_last": True, "edges": 4},
    "one edge, one path, no ghosts": {"edges": 1, "paths": 1, "ghost": 0},
    "masked": {"masked": True},
    "masked, stride 2": {"masked": True, "stride": 2, "ghosts_last": True},
    "strides 2 and 1": {"stride": (2, 1), "edges": 2},
    "gain per edge": {"gain": "edge", "edges": 3},
    "gain per channel": {"gain": "channel", "edges": 2, "stride": 2},
    "tile 5, chosen ghosts": {"tile": 5, "length": 13, "ghost": [1, 4]},
    "even tile and length": {"tile": 2, "length": 8},
    "one tile": {"length": 3, "residual": False},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_every_form_is_the_definition_in_value_and_gradient(case, training):
    twin = build(**CASES[case]).train(training)
    modules = [copy.deepcopy(twin) for _ in FORMS]
    x = torch.randn(2, 7, 8, 13, dtype=torch.float64, requires_grad=True)
    expected = slow(twin, x)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    for module, form in zip(modules, FORMS, strict=True):
        module.form = form
        x1 = x.detach().clone().requires_grad_()
        y = module(x1)
        assert y.shape == expected.shape
        assert error(y, expected) <= EXACT
        y.backward(grad)
        assert error(x1.grad, x.grad) <= 10 * EXACT
        for (name, parameter), (_, other) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
            assert (parameter.grad - other.grad).norm() <= 100 * EXACT * other.grad.norm(), name
        for branch in BRANCHES:
            assert error(module.norm(branch).running_mean, twin.norm(branch).running_mean) <= EXACT
            assert error(module.norm(branch).running_var, twin.norm(branch).running_var) <= EXACT
        if not training:
            with torch.no_grad():
                for _ in range(2):  # the second time with the cached plan
                    assert error(module(x), expected) <= EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (2, 30), (17, 3)])
def test_maps_smaller_than_the_strips(size, form):
    module = build(form=form).eval()
    x = torch.randn(1, 7, *size, dtype=torch.float64)
    assert error(module(x), slow(module, x)) <= EXACT
    assert error(module(x[0]), slow(module, x)[0]) <= EXACT


@pytest.mark.parametrize("form", FORMS)
def test_orders_may_put_several_tiles_in_one_place(form):
    module = build(form=form).eval()
    before = module(x := torch.randn(1, 7, 9, 9, dtype=torch.float64))
    module.set_orders(*(torch.randint_like(getattr(module, branch), module.tiles) for branch in BRANCHES))
    assert error(module(x), slow(module, x)) <= EXACT
    assert not torch.allclose(module(x), before)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_the_draws_are_those_of_the_published_module():
    channels, tiles, edges = 6, 5, 3
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn, active = draw_orders(channels, tiles, edges), active_channels(20, 0.23)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()

    with torch.random.fork_rng():
        torch.manual_seed(123)
        for order in (drawn.horizontal, drawn.vertical):
            for edge in range(edges):
                for channel in range(channels):
                    for place, tile in enumerate(torch.randperm(tiles).tolist()):
                        assert order[edge, channel, tile] == place
        for edge in range(edges):
            assert drawn.identity[edge].tolist() == torch.randint(0, tiles, [channels]).tolist()
    np.random.seed(123)
    ghosts = np.random.choice(20, 20 - 14, replace=False)  # int(20 * 0.77) = 15, made even
    assert active.tolist() == sorted(set(range(20)) - set(ghosts.tolist()))


def test_seeds_decide_and_nothing_else():
    torch.manual_seed(0)
    first = SWConv2d(16, 13)
    torch.manual_seed(1)
    second, third = SWConv2d(16, 13), SWConv2d(16, 13, seed=7)
    for name in (*BRANCHES, "active"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert not torch.equal(getattr(first, name), getattr(third, name))
    assert not torch.equal(first.paths[0].weight, second.paths[0].weight)
    assert not torch.equal(first.paths[0].weight, first.paths[1].weight)


def test_what_one_module_does_to_its_orders_stays_with_it():
    first, second = SWConv2d(8, 13), SWConv2d(8, 13)
    kept = second.horizontal.clone(), second._table("horizontal_index").clone()
    first.set_orders(*(torch.zeros_like(getattr(first, branch)) for branch in BRANCHES))
    third = SWConv2d(8, 13)
    for module in (second, third):
        assert torch.equal(module.horizontal, kept[0])
        assert torch.equal(module._table("horizontal_index"), kept[1])


def test_ghost_fractions():
    assert len(active_channels(80, 0.23)) == 60
    assert len(active_channels(7, 0.3)) == 4
    assert len(active_channels(7, 0)) == 7
    assert active_channels(4, [0, 3]).tolist() == [1, 2]


# ---- paths, masks, gains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_masked_filter_contributes_nothing_and_has_no_gradient(form):
    module = build(masked=True, form=form).train()
    path = module.paths[0]
    off = ~path.mask.flatten()
    x = torch.randn(2, 7, 8, 8, dtype=torch.float64)
    y = module(x)
    y.square().sum().backward()
    assert off.any()
    assert not path.weight.grad[off].any()
    assert path.weight.grad[~off].flatten(1).any(1).all()
    with torch.no_grad():
        path.weight[off] = torch.nan
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("form", FORMS)
def test_writing_to_a_mask_renews_what_is_cached(form):
    module = build(masked=True, form=form).eval()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        module.paths[0].mask.logical_not_()
        after = module(x)
        assert error(after, slow(module, x)) <= EXACT
        assert not torch.allclose(after, before)
        for path in module.paths:
            path.set_mask(None)
        assert error(module(x), slow(module, x)) <= EXACT


def test_live_tiles_are_those_of_any_path():
    module = build(masked=True)
    assert torch.equal(module.live, module.paths[0].mask | module.paths[1].mask)
    module.paths[0].set_mask(None)
    assert module.live is None
    assert build().live is None


@pytest.mark.parametrize("form", FORMS)
def test_edges_at_gain_zero_change_nothing_and_learn(form):
    module = build(edges=3, gain="edge", form=form).train()
    single = build(edges=1, form=form).train()
    with torch.no_grad():
        module.gain.copy_(torch.tensor([1.0, 0, 0]).expand(3, 3))
        single.load_state_dict(module.state_dict() | {b: getattr(module, b)[:1] for b in BRANCHES}, strict=False)
    x = torch.randn(2, 7, 8, 8, dtype=torch.float64)
    y = module(x)
    assert error(y, single(x)) <= EXACT
    y.square().sum().backward()
    assert (module.gain.grad != 0).all()


def test_the_shared_bank_is_convolved_once():
    module = build(form="shift")
    branches = module.parts()
    for fold in (False, True):
        parts = [branch.placed((0, 0), fold=fold) for branch in branches]
        (group,) = prepare_shift(
            [[one for part in parts for one in part]] if fold else parts, Call((9, 9), (9, 9), (1, 1), torch.float32)
        )
        assert group.tiles == module.tiles + 1  # the residual is the one more
        assert group.weight.shape == (4 * (module.tiles + 1), 1, 3, 3)
        assert len(group.outputs) == 4


# ---- laid-out branches with more edges ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("size", "tile", "dilation"), [((11, 3), 3, 1), ((3, 10), 3, 1), ((7, 7), 4, 2), ((9, 9), 3, 1)]
)
def test_a_laid_out_branch_gets_edges(size, tile, dilation, per_channel, form):
    torch.manual_seed(0)
    padding = tuple(dilation * (k // 2) for k in size for _ in range(2))
    geometry = BranchGeometry(size, padding, (dilation, dilation))
    laid = Branch.from_kernel(geometry, torch.randn(4, 1, *size), tile, bias=torch.randn(4), bn=nn.BatchNorm2d(4))
    laid = laid.double()
    branch = laid.with_edges(3, per_channel=per_channel)
    one, more = (ShiftwiseConv2d(4, 4, (1, 2), [b], form=form) for b in (laid, branch))
    x = torch.randn(2, 4, 12, 15, dtype=torch.float64)
    assert branch.gain.shape == ((3, 4) if per_channel else (3,))
    for training in (True, False):
        assert error(more.train(training)(x), one.train(training)(x)) <= EXACT
    more(x).square().sum().backward()
    assert (branch.gain.grad != 0).all()

    with torch.no_grad():
        branch.gain.normal_(), branch.bank.normal_()
    kernel = torch.zeros_like(more.kernels()[0][0].weight)
    scale = branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt()
    for c in range(4):
        for row, (t, dy, dx) in enumerate(branch.placements[c].tolist()):
            gain = branch.gain[row // branch.bank.shape[1]]
            gain = gain[c] if per_channel else gain
            kernel[c, 0, dy : dy + tile, dx : dx + tile] += scale[c] * gain * branch.bank[c, t]
    assert error(more.weight, kernel) <= EXACT
    again = pickle.loads(pickle.dumps(more)).eval()
    assert torch.equal(again(x), more(x))


def test_gains_that_do_not_fit_are_refused():
    geometry = BranchGeometry((9, 9), (4, 4, 4, 4))
    laid = Branch.from_kernel(geometry, torch.randn(2, 1, 9, 9), 3)
    with pytest.raises(ValueError, match="9 rows of placements, expected a multiple of the 2 edges"):
        Branch(geometry, laid.bank, laid.placements, gain=nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="edges 0"):
        laid.with_edges(0)
    with pytest.raises(ValueError, match="not laid out"):
        laid.with_edges(2).with_edges(2)


# ---- back to plain convolutions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_merge_and_reparameterize_keep_the_function(case):
    module = build(**CASES[case]).eval()
    x = torch.randn(2, 7, 8, 13, dtype=torch.float64)
    expected = slow(module, x)
    plain = merge(module)
    assert not any(isinstance(m, ShiftwiseConv2d | nn.BatchNorm2d) for m in plain.modules())
    assert error(plain(x), expected) <= EXACT
    module.reparameterize()
    for form in FORMS:
        module.form = form
        assert error(module(x), expected) <= EXACT
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert not set(TABLES) & {name for name, _ in module.named_buffers()}
    again = pickle.loads(pickle.dumps(module))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))
    assert error(merge(module)(x), expected) <= EXACT


def test_a_merged_module_is_two_strips():
    plain = merge(build(length=51, ghosts_last=True).eval())
    order, strips = plain
    assert isinstance(order, ChannelOrder)
    assert isinstance(strips, ParallelConv2d)
    assert sorted(conv.kernel_size for conv in strips) == [(3, 51), (51, 3)]
    assert isinstance(merge(build(length=51).eval()), ParallelConv2d)
    module = build(length=51).eval()
    assert module.weight.shape == (7, 1, 51, 51)
    assert module.bias.shape == (7,)
    x = torch.randn(1, 7, 30, 20, dtype=torch.float64)
    assert error(F.conv2d(x, module.weight, module.bias, padding=25, groups=7), module(x)) <= EXACT


def test_timm_reparameterizes_it():
    model = nn.Sequential(build().eval(), nn.ReLU())
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    merged = reparameterize_model(model)
    assert merged[0].merged
    assert not model[0].merged
    assert error(merged(x), model(x)) <= EXACT


# ---- state ----------------------------------------------------------------------------------------------------------


def test_orders_channels_gains_and_masks_travel_with_the_state():
    source = build(masked=True, gain="edge").eval()
    target = build(seed=6, gain="edge").eval()  # other numbers, other orders, other ghosts, no masks
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    assert not torch.equal(target.active, source.active)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(x), source(x))
    assert {name.rpartition(".")[2] for name in source.state_dict()} >= {*BRANCHES, "active", "gain", "mask"}
    assert not set(TABLES) & set(source.state_dict())


def test_copies_are_independent_and_equal():
    module = build(masked=True).eval()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        with torch.no_grad():
            twin.paths[0].weight.zero_()
        assert not torch.equal(twin(x), module(x))


def test_from_the_meta_device():
    source = build().eval()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    for assign in (False, True):
        with torch.device("meta"):
            target = build(seed=6).eval()
        assert all(tensor.is_meta for tensor in (*target.parameters(), *target.buffers()))
        target = target if assign else target.to_empty(device="cpu")
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(x), source(x))
    with torch.device("meta"):
        target = build(gain="edge")
    target.to_empty(device="cpu").reset_parameters()
    fresh = SWConv2d(7, 11, ghost=0.3, seed=5, gain="edge", dtype=torch.float64)
    for name, buffer in fresh.named_buffers():
        torch.testing.assert_close(target.get_buffer(name), buffer, rtol=0, atol=0)
    assert (target.gain == 1).all()
    assert 0.015 < target.paths[1].weight.std() < 0.025


def test_an_exchanged_batch_norm_is_used():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    assert all(isinstance(module.norm(branch), nn.SyncBatchNorm) for branch in BRANCHES)
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    assert error(module.eval()(x), build().eval()(x)) <= EXACT
    with torch.no_grad():
        module.bn_vertical.weight.mul_(2)
    assert error(module(x), slow(module, x)) <= EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_stays_within_its_bound(dtype, form):
    module = build(channels=8, form=form).eval()
    with torch.no_grad():
        for path in module.paths:
            path.weight.mul_(0.1)
    low = copy.deepcopy(module).to(dtype)
    x = torch.randn(2, 8, 14, 14).to(dtype)
    y = low(x)
    assert y.dtype == dtype
    assert error(y.double(), low.double()(x.double())) <= BOUNDS[dtype]


@pytest.mark.parametrize(("form", "training"), sample(product(FORMS, [False, True]), [("shift", True)]))
def test_compiles_without_a_graph_break(form, training):
    module = build(form=form, masked=True, gain="edge").train(training)
    x = torch.randn(2, 7, 9, 9, dtype=torch.float64)
    expected = copy.deepcopy(module)(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_is_a_leaf_to_fx():
    model = nn.Sequential(build().eval(), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_memory_format_follows_the_input():
    x = torch.randn(2, 7, 9, 9, dtype=torch.float64)
    for settings in ({}, {"ghosts_last": True}, {"ghost": 0}):
        module = build(**settings).eval()
        assert module(x).is_contiguous()
        assert module(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SWConv2d(8, 0), "kernel_size 0, expected an integer of at least 1"),
        (lambda: SWConv2d(8, 13, 2.5), "tile 2.5"),
        (lambda: SWConv2d(8, 13, edges=0), "edges 0"),
        (lambda: SWConv2d(8, 13, paths=True), "paths True"),
        (lambda: SWConv2d(8, 13, gain="tile"), "gain 'tile', expected None, 'edge' or 'channel'"),
        (lambda: SWConv2d(8, 13, stride=0), "stride"),
        (lambda: SWConv2d(8, 13, form="quick"), "form: got 'quick'"),
        (lambda: SWConv2d(8, 13, ghost=1), "expected a fraction from 0 to below 1"),
        (lambda: SWConv2d(2, 13, ghost=0.23), "leaves none of 2 channels"),
        (lambda: SWConv2d(8, 13, ghost=[8]), r"\[8\], expected some of 0 to 7"),
        (lambda: SWConv2d(8, 13)(torch.randn(1, 6, 9, 9)), r"\(1, 6, 9, 9\), expected"),
        (lambda: SWConv2d(8, 13).set_orders(*[torch.zeros(1, 6, 5)] * 3), r"horizontal: shape \(1, 6, 5\)"),
        (
            lambda: (m := SWConv2d(8, 13)).set_orders(m.horizontal, m.vertical + 1, m.identity),
            "vertical: values 1 to 5, expected 0 to 4",
        ),
        (lambda: SWConv2d(8, 13).paths[0].set_mask(torch.ones(6, 5)), r"torch.float32 of shape \(6, 5\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_paths_are_found_by_their_names():
    module = SWConv2d(8, 15, paths=2)
    assert module.get_submodule("paths.1") is module.paths[1]
    assert module.get_parameter("paths.0.weight") is module.paths[0].weight


def kept_bytes(module, x):
    """What a forward pass keeps for the backward pass, every storage once, and the result."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    return sum(kept.values()), y


@pytest.mark.parametrize("form", ["assembled", "gemm", "toeplitz"])
def test_recomputing_keeps_less_and_changes_no_bit(form):
    torch.manual_seed(0)
    module = SWConv2d(16, 13, ghost=0.25, form=form).double().train()
    x = torch.randn(40, 16, 12, 12, dtype=torch.float64)
    one_map = 0.75 * x.nbytes
    results, kept = [], []
    for recompute in ("none", "small", "all"):
        twin = copy.deepcopy(module)
        twin.recompute = recompute
        given = x.clone().requires_grad_()
        bytes_, y = kept_bytes(twin, given)
        assert twin.decision.form == form
        kept.append(bytes_)
        y.square().sum().backward()
        results.append([y, given.grad, *(p.grad for p in twin.parameters()), *twin.buffers()])
    assert kept[0] - kept[1] == pytest.approx(one_map, rel=0.01)  # that of the identity branch
    assert kept[1] - kept[2] == pytest.approx(2 * one_map, rel=0.01)
    assert module.recompute == "small"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_the_first_stage_keeps_in_training():
    """The published operator keeps 21 times its input; at most 3 times is the aim."""
    x = torch.randn(16, 80, 56, 56, requires_grad=True)
    kept, _ = kept_bytes(SWConv2d(80, 51, form="toeplitz").train(), x)
    assert kept <= 2.4 * x.nbytes
