"""Dynamic sparsity: SNIP, prune-and-grow, masks that travel, ranks that agree, trainers."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sw_transplant import NoLargeKernelError, ShiftwiseConv2d, SWConfig, convert
from sw_transplant.forms import Call, prepare_shift
from sw_transplant.geometry import BranchGeometry
from sw_transplant.layers.branch import Branch
from sw_transplant.layers.shared_bank import TilePath
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.sparsity import FilterSparsity, snip_scores, sparsity_callback, sparsity_report
from sw_transplant.sparsity.masked_layers import ELEMENT_MASK, masked_layers

FORMS = ["shift", "assembled"]
CLASSES = 4


class Tiny(nn.Module):
    """Two stages of the paper's module, with parallel paths, between a stem and a classifier."""

    def __init__(self, form="assembled", channels=8, paths=2):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.stages = nn.Sequential(
            SWConv2d(channels, 15, 3, edges=2, paths=paths, ghost=0, form=form),
            SWConv2d(channels, 9, 3, edges=2, paths=paths, ghost=0, form=form),
        )
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, pixel_values, labels=None):
        logits = self.head(F.gelu(self.stages(self.stem(pixel_values))).mean((2, 3)))
        return logits if labels is None else (F.cross_entropy(logits, labels), logits)


class LaidOut(nn.Sequential):
    """A SLaK-like sum of two strips and a small kernel, converted exactly: 11 x 5 fills its tiles, 13 x 5 does not."""

    def __init__(self, form="assembled"):
        torch.manual_seed(0)
        branches = [
            Branch.from_kernel(
                BranchGeometry((h, w), (h // 2, h // 2, w // 2, w // 2)),
                torch.randn(6, 1, h, w) / 9,
                5,
                bn=nn.BatchNorm2d(6),
            )
            for h, w in ((13, 5), (5, 13), (5, 5))
        ]
        block = ShiftwiseConv2d(6, 6, (1, 1), branches, form=form)
        super().__init__(nn.Conv2d(3, 6, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def batch(seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator)


def sparse(model, **settings):
    """Sparsity on a model, initialised."""
    sparsity = FilterSparsity(model, **{"update_frequency": 1, "sparse_gap": 4, **settings})
    sparsity.initialise((*batch(99), F.cross_entropy))
    return sparsity


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def masks(model, only_L=True):
    found = {layer.path: layer.mask.clone() for group in masked_layers(model, only_L=only_L) for layer in group}
    assert found
    return found


def counts(model, only_L=True):
    return {path: int(mask.sum()) for path, mask in masks(model, only_L).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the mask itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [Tiny, LaidOut])
def test_masked_filters_contribute_nothing_and_get_no_gradient(build, form):
    model = build(form).double()
    layers = [layer for group in masked_layers(model) for layer in group]
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        layer.owner.set_mask(torch.rand(layer.units, generator=generator) < 0.5)
    images = batch()[0].double()
    expected = model(images)
    expected.square().sum().backward()
    for layer in layers:
        idle = ~layer.spread(layer.mask)
        assert layer.weight.grad[~idle].abs().sum() > 0
        assert not layer.weight.grad[idle].any()
        with torch.no_grad():
            layer.weight[idle] = 1e3
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [Tiny, LaidOut])
def test_exploring_shows_the_gradients_of_idle_filters_and_changes_nothing_else(build, form):
    model = build(form).double()
    layers = [layer for group in masked_layers(model) for layer in group]
    dense = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for layer, twin in zip(layers, (twin for group in masked_layers(dense) for twin in group), strict=True):
        layer.owner.set_mask(torch.rand(layer.units, generator=generator) < 0.5)
        layer.owner.explores = True
        with torch.no_grad():
            twin.weight.masked_fill_(~layer.spread(layer.mask), 0)
    images = batch()[0].double()
    for each in (model, dense):
        each(images).square().sum().backward()
    torch.testing.assert_close(model(images), dense(images))
    for layer, twin in zip(layers, (twin for group in masked_layers(dense) for twin in group), strict=True):
        assert layer.weight.grad[~layer.spread(layer.mask)].abs().sum() > 0
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


def test_a_change_of_the_mask_in_eval_is_seen():
    model = Tiny().eval()
    sparse(model)
    with torch.no_grad():
        images = batch()[0]
        before = model(images)
        path = next(module for module in model.modules() if isinstance(module, TilePath))
        nn.init.ones_(path.weight)
        path.mask.logical_not_()
        assert not torch.equal(model(images), before)


def test_set_mask_refuses_another_shape_or_dtype():
    branch = LaidOut()[1].branches[0]
    with pytest.raises(
        ValueError, match=r"Branch.set_mask: torch.bool of shape \(6, 2\), expected torch.bool \(6, 3\)"
    ):
        branch.set_mask(torch.ones(6, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        branch.set_mask(torch.ones(6, 3))
    branch.set_mask(torch.zeros(6, 3, dtype=torch.bool))
    branch.set_mask(None)
    assert branch.mask is None


# ---- SNIP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Tiny, LaidOut])
def test_snip_scores_are_the_naive_ones(build):
    model = build()
    layers = [layer for group in masked_layers(model, only_L=False) for layer in group]
    images, labels = batch()
    scores = snip_scores(model, layers, (images, labels, F.cross_entropy))

    twin = copy.deepcopy(model)
    F.cross_entropy(twin(images), labels).backward()
    for layer, score in zip(layers, scores, strict=True):
        weight = dict(twin.named_modules())[layer.path]
        weight = weight.bank if isinstance(weight, Branch) else weight.weight
        product = (weight.grad * weight).abs().detach()
        assert score.shape == layer.units
        for unit in np.ndindex(*layer.units):
            if isinstance(layer.owner, TilePath):
                filter_ = product[unit[0] * layer.owner.tiles + unit[1], 0]
            else:
                filter_ = product[unit]
            if isinstance(layer.owner, Branch) and layer.owner.support is not None:
                filter_ = filter_[layer.owner.support[0, unit[1]]]  # the last tile of 13 = 5 + 5 + 3 counts its 3 rows
            torch.testing.assert_close(score[unit], filter_.mean(), rtol=1e-4, atol=1e-9)


def test_one_threshold_decides_over_all_large_kernels():
    model = Tiny()
    layers = masked_layers(model)
    scores = [torch.stack(snip_scores(model, group, (*batch(99), F.cross_entropy))).mean(0) for group in layers]
    sparse(model, sparsity=0.4)
    kept = torch.cat([score[group[0].mask] for score, group in zip(scores, layers, strict=True)])
    left = torch.cat([score[~group[0].mask] for score, group in zip(scores, layers, strict=True)])
    assert len(kept) == round(0.6 * (len(kept) + len(left)))
    assert kept.min() >= left.max()
    densities = [entry.density for entry in sparsity_report(model).stages]
    assert densities[0] != densities[1]
    for first, second in layers:  # parallel paths begin with a common mask
        assert torch.equal(first.mask, second.mask)
        assert not first.weight[~first.spread(first.mask)].any()


def test_large_kernels_and_the_rest_have_thresholds_of_their_own():
    model = Tiny()
    with torch.no_grad():
        model.head.weight.mul_(1e4)  # under a common threshold the rest would stay whole
    sparse(model, sparsity=0.5, only_L=False)
    filters, weights = sparsity_report(model).totals
    assert (filters.unit, filters.density) == ("filter", 0.5)
    assert (weights.unit, weights.density) == ("weight", 0.5)


def test_no_layer_is_emptied():
    model = Tiny()
    with torch.no_grad():
        for path in model.stages[0].paths:
            path.weight.mul_(1e-12)
    sparse(model, sparsity=0.9)
    assert counts(model)["stages.0.paths.0"] == 1


def test_snip_random_has_the_same_counts_and_other_filters():
    scored, drawn, again = Tiny(), Tiny(), Tiny()
    sparse(scored)
    sparse(drawn, init="snip_random")
    sparse(again, init="snip_random")
    assert counts(scored) == counts(drawn)
    assert not same(masks(scored), masks(drawn))
    assert same(masks(drawn), masks(again))


def test_initialise_leaves_gradients_and_statistics_alone():
    model = Tiny()
    statistics = {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name or "num_" in name}
    sparsity = FilterSparsity(model)
    images, labels = batch()
    calls = []
    sparsity.initialise(lambda: calls.append(1) or F.cross_entropy(model(images), labels))
    assert calls == [1]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(statistics, {name: tensor for name, tensor in model.named_buffers() if name in statistics})


# ---- prune and grow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("growth", "only_L"), [("random", True), ("random", False), ("gradient", True), ("gradient", False)]
)
def test_density_of_every_layer_is_constant_and_the_masks_move(growth, only_L):
    model = Tiny()
    sparsity = sparse(model, growth=growth, only_L=only_L)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.attach(optimizer)
    expected, before = counts(model, only_L), masks(model, only_L)
    moved = set()
    for step in range(50):
        train(model, optimizer, 1, step)
        assert counts(model, only_L) == expected
        for layer in (layer for group in masked_layers(model, only_L=only_L) for layer in group):
            assert not layer.weight[~layer.spread(layer.mask)].any()
            if not torch.equal(layer.mask, before[layer.path]):
                moved.add(layer.path)
    assert moved == {path for path, mask in before.items() if not mask.all()}
    assert len(moved) >= 4


@pytest.mark.parametrize("build", [Tiny, LaidOut])
def test_the_smallest_filters_go_and_others_come(build):
    model = build()
    sparsity = sparse(model, adaptation_rate=0.25, sparse_gap=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsity.attach(optimizer)
    old, layers = masks(model), [layer for group in masked_layers(model) for layer in group]
    magnitude = {layer.path: layer.weight.detach().abs().reshape(*layer.units, -1).sum(-1) for layer in layers}
    train(model, optimizer, 1)
    for layer in layers:
        was, now = old[layer.path], layer.mask
        pruned, stayed = was & ~now, was & now
        exchanged = min(int(0.25 * was.sum()), int((~was).sum()))
        assert int(pruned.sum()) == int((now & ~was).sum()) == exchanged > 0
        assert magnitude[layer.path][pruned].max() <= magnitude[layer.path][stayed].min()


def test_growth_by_gradient_takes_the_largest_and_hides_them_from_the_optimizer():
    model = Tiny(paths=1)
    sparsity = sparse(model, growth="gradient", adaptation_rate=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sparsity.attach(optimizer)
    old, layers = masks(model), [layer for group in masked_layers(model) for layer in group]
    dense = Tiny(paths=1)
    dense.load_state_dict({name: value for name, value in model.state_dict().items() if not name.endswith("mask")})
    images, labels = batch(0)
    F.cross_entropy(dense(images), labels).backward()
    train(model, optimizer, 1)
    for layer in layers:
        grad = dict(dense.named_modules())[layer.path].weight.grad.abs().reshape(*layer.units, -1).sum(-1)
        idle, grown = ~old[layer.path], layer.mask & ~old[layer.path]
        assert grown.any()
        assert grad[grown].min() >= grad[idle & ~grown].max()
        assert not optimizer.state[layer.weight]["momentum_buffer"][layer.spread(grown)].any()


def test_paths_are_free_between_the_updates_that_give_them_a_common_mask():
    model = Tiny(channels=24)
    sparsity = sparse(model, sparse_gap=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    equal = []
    for step in range(10):
        train(model, optimizer, 1, step)
        equal.append([torch.equal(first.mask, second.mask) for first, second in masked_layers(model)])
    assert equal == [[step % 5 == 4] * 2 for step in range(10)]


def test_weights_and_state_of_the_optimizer_are_reset_for_filters_that_grow_again():
    model = Tiny()
    sparsity = sparse(model, update_frequency=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    sparsity.attach(optimizer)
    layers = [layer for group in masked_layers(model) for layer in group]
    once_used = masks(model)
    again = 0
    for step in range(0, 12, 2):
        old = masks(model)
        train(model, optimizer, 2, step)
        for layer in layers:
            grown, stayed = layer.mask & ~old[layer.path], layer.mask & old[layer.path]
            again += int((grown & once_used[layer.path]).sum())
            once_used[layer.path] |= layer.mask
            state = optimizer.state[layer.weight]
            for value in (layer.weight, *(state[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))):
                assert not value[layer.spread(grown)].any()
                assert value[layer.spread(stayed)].abs().min() > 0
            assert state["step"] == step + 2
    assert again > 0


def test_rate_falls_as_half_a_cosine_and_then_nothing_moves():
    model = Tiny()
    sparsity = sparse(model, adaptation_rate=0.4, total_steps=8)
    assert [sparsity.rate(step) for step in (0, 4, 8, 100)] == pytest.approx([0.4, 0.2, 0, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    train(model, optimizer, 8)
    before = masks(model)
    train(model, optimizer, 2, 8)
    assert same(masks(model), before)
    assert FilterSparsity(Tiny(), adaptation_rate=0.4).rate(10**6) == 0.4


def test_step_without_an_attached_optimizer():
    attached, manual = Tiny(), Tiny()
    by_hook, by_hand = sparse(attached, update_frequency=2), sparse(manual, update_frequency=2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (attached, manual)]
    by_hook.attach(optimizers[0])
    for step in range(4):
        train(attached, optimizers[0], 1, step)
        train(manual, optimizers[1], 1, step)
        by_hand.step()
    assert by_hand.steps == by_hook.steps == 4
    assert same(masks(attached), masks(manual))


def test_an_optimizer_of_timm_that_wraps_another():
    optim = pytest.importorskip("timm.optim")
    model = Tiny()
    sparsity = sparse(model)
    optimizer = optim.create_optimizer_v2(model, opt="lookahead_adamw", lr=1e-2)
    sparsity.attach(optimizer)
    expected = counts(model)
    train(model, optimizer, 7)
    assert sparsity.steps == 7
    assert counts(model) == expected
    for layer in (layer for group in masked_layers(model) for layer in group):
        assert not layer.weight[~layer.spread(layer.mask)].any()


def test_detach_ends_it():
    model = Tiny()
    sparsity = sparse(model, growth="gradient")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    train(model, optimizer, 1)
    before = masks(model)
    sparsity.detach()
    train(model, optimizer, 2)
    assert same(masks(model), before)
    assert not any(path.explores for path in model.modules() if isinstance(path, TilePath))
    sparsity.attach(optimizer)


# ---- saved, loaded, distributed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("only_L", [True, False])
def test_a_saved_and_reloaded_run_goes_on_bit_for_bit(tmp_path, growth, only_L):
    settings = {"update_frequency": 2, "sparse_gap": 3, "total_steps": 40, "growth": growth, "only_L": only_L}

    def start():
        model = Tiny()
        sparsity = FilterSparsity(model, **settings)
        return model, sparsity, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, sparsity, optimizer = start()
    sparsity.initialise((*batch(99), F.cross_entropy))
    sparsity.attach(optimizer)
    train(whole, optimizer, 7)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(whole, optimizer, 9, 7)

    resumed, again, optimizer = start()
    again.attach(optimizer)
    saved = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert again.steps == 7
    train(resumed, optimizer, 9, 7)
    assert same(masks(whole, only_L), masks(resumed, only_L))
    assert same(whole.state_dict(), resumed.state_dict())


def test_masks_are_in_the_state_dict_and_load_into_a_model_without():
    model, laid_out = Tiny(), LaidOut()
    for each in (model, laid_out):
        sparse(each)
    fresh = Tiny()
    fresh.load_state_dict(model.state_dict())
    assert same(masks(fresh), masks(model))
    fresh = LaidOut()
    fresh.load_state_dict(laid_out.state_dict())
    assert same(masks(fresh), masks(laid_out))
    torch.testing.assert_close(fresh.eval()(batch()[0]), laid_out.eval()(batch()[0]), rtol=0, atol=0)


def test_state_dict_counts_the_steps():
    sparsity = FilterSparsity(Tiny())
    sparsity.load_state_dict({"steps": 12})
    assert sparsity.state_dict() == {"steps": 12}
    with pytest.raises(ValueError, match=r"load_state_dict: got \{'step': 1\}, expected"):
        sparsity.load_state_dict({"step": 1})


def _train_alone(rank, folder):
    """A process that never exchanges gradients: its weights, hence its own choice of filters, drift away."""
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    model = Tiny()
    sparsity = FilterSparsity(model, update_frequency=1, sparse_gap=4, seed=rank)
    sparsity.initialise((*batch(rank), F.cross_entropy))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsity.attach(optimizer)
    for step in range(10):
        train(model, optimizer, 1, 1000 * rank + step)
    torch.save((masks(model), model.state_dict()), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_same_masks_after_updates_on_different_data(tmp_path):
    torch.multiprocessing.start_processes(_train_alone, (tmp_path,), nprocs=2, start_method="fork")
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert not torch.equal(weights["head.weight"], others["head.weight"])
    for path, mask in second.items():
        idle = ~mask.reshape(-1)
        assert idle.any()
        assert not others[f"{path}.weight"][idle].any()


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        images, labels = batch(index, 1)
        return {"pixel_values": images[0], "labels": labels[0]}


def _trainer(model, sparsity, folder, **arguments):
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=Images(), callbacks=[sparsity_callback(sparsity)])


def test_trainer_prunes_grows_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    model = Tiny()
    sparsity = sparse(model, update_frequency=2)
    expected, before = counts(model), masks(model)
    _trainer(model, sparsity, tmp_path, save_steps=4).train()
    assert (sparsity.steps, sparsity.total_steps) == (8, 8)
    assert counts(model) == expected
    assert not same(masks(model), before)

    resumed = Tiny()
    again = FilterSparsity(resumed, update_frequency=2, sparse_gap=4)
    _trainer(resumed, again, tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.steps == 8
    assert same(masks(resumed), masks(model))


def test_the_callback_alone():
    """What the Trainer does to a callback, without Accelerate, which it asks for."""
    callback_of = pytest.importorskip("transformers")
    model = Tiny()
    sparsity = sparse(model)
    callback = sparsity_callback(sparsity)
    assert isinstance(callback, callback_of.TrainerCallback)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = callback_of.TrainerState(max_steps=20)
    callback.on_train_begin(None, state, None, optimizer=optimizer)
    train(model, optimizer, 3)
    callback.on_train_end(None, state, None)
    train(model, optimizer, 1)
    assert (sparsity.steps, sparsity.total_steps) == (3, 20)


# ---- report ---------------------------------------------------------------------------------------------------------


def test_report_counts_layers_and_stages_and_prints():
    model = Tiny()
    sparse(model, sparsity=0.5)
    report = sparsity_report(model)
    found = {entry.path: (entry.in_use, entry.total) for entry in report.layers}
    assert found == {path: (int(mask.sum()), mask.numel()) for path, mask in masks(model).items()}
    assert {entry.path: entry.in_use for entry in report.stages} == {
        f"stages.{i}": sum(count for path, count in counts(model).items() if path.startswith(f"stages.{i}"))
        for i in (0, 1)
    }
    assert report.totals[0].density == 0.5
    assert json.loads(json.dumps(report.to_dict()))["totals"][0]["in_use"] == report.totals[0].in_use
    text = str(report)
    assert "stages.0.paths.1" in text
    assert "50.00%" in text


def test_report_of_a_model_without_masks():
    assert {entry.density for entry in sparsity_report(Tiny()).layers} == {1.0}
    assert sparsity_report(nn.Linear(2, 2)).layers == ()
    assert "In use" in str(sparsity_report(nn.Linear(2, 2)))


def test_small_kernels_and_ordinary_layers_are_masked_only_if_asked():
    kernels = nn.Sequential(nn.Conv2d(4, 4, 13, padding=6, groups=4), nn.Conv2d(4, 4, 1))
    model = convert(kernels, SWConfig(tile=5))
    FilterSparsity(model)
    assert not hasattr(model[1], ELEMENT_MASK)
    FilterSparsity(model, only_L=False)
    assert getattr(model[1], ELEMENT_MASK).shape == (4, 4, 1, 1)
    large = {layer.path: layer.large for group in masked_layers(LaidOut(), only_L=False) for layer in group}
    assert large == {"0": False, "1.branches.0": True, "1.branches.1": True, "1.branches.2": False, "4": False}


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0, expected a share of at least 0 and below 1"),
        ({"adaptation_rate": 0}, "adaptation_rate 0, expected a share above 0"),
        ({"update_frequency": 0}, "update_frequency 0, expected at least 1"),
        ({"sparse_gap": 0}, "sparse_gap 0, expected at least 1"),
        ({"total_steps": 0}, "total_steps 0, expected at least 1"),
        ({"seed": -1}, "seed -1, expected 0 or more"),
        ({"init": "erk"}, "init 'erk', expected one of"),
        ({"growth": "none"}, "growth 'none', expected one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FilterSparsity(Tiny(), **settings)


def test_nothing_to_mask():
    with pytest.raises(
        NoLargeKernelError, match="no layer to mask, expected trainable large kernels; convert the model"
    ):
        FilterSparsity(nn.Linear(2, 2))
    with pytest.raises(NoLargeKernelError, match="4 layers, all frozen to mask"):
        FilterSparsity(Tiny().requires_grad_(False))


def test_a_loss_that_says_nothing():
    sparsity = FilterSparsity(Tiny())
    with pytest.raises(ValueError, match="expected one number with a gradient"):
        sparsity.initialise(lambda: torch.ones(()))
    with pytest.raises(ValueError, match=r"a tensor of shape \(2,\)"):
        sparsity.initialise(lambda: torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="does not depend on any masked layer"):
        sparsity.initialise(lambda: torch.ones((), requires_grad=True) * 2)
    images, labels = batch()
    with pytest.raises(ValueError, match=r"stages.0.paths.0: the gradient of the loss nan is not finite"):
        sparsity.initialise((images * float("nan"), labels, F.cross_entropy))


def test_training_without_masks_is_refused():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FilterSparsity(model).attach(optimizer)
    with pytest.raises(ValueError, match="no mask has been chosen; call initialise"):
        train(model, optimizer, 1)


def test_attach_refuses_what_it_cannot_serve():
    model = Tiny()
    sparsity = sparse(model)
    with pytest.raises(ValueError, match=r"attach: got str, expected a torch.optim.Optimizer"):
        sparsity.attach("adam")
    with pytest.raises(ValueError, match=r"stages.0.paths.0: the optimizer does not hold its weight"):
        sparsity.attach(torch.optim.SGD(model.head.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.attach(optimizer)
    with pytest.raises(ValueError, match="already attached"):
        sparsity.attach(optimizer)
    with pytest.raises(ValueError, match="counts already; remove this call"):
        sparsity.step()
    with pytest.raises(ValueError, match="works attached only"):
        sparse(Tiny(), growth="gradient").step()


def test_paths_of_unequal_counts_cannot_share_a_mask():
    model = Tiny()
    sparsity = sparse(model, sparse_gap=1)
    model.stages[0].paths[1].mask.fill_(True)
    with pytest.raises(ValueError, match=r"stages.0.paths.0: the parallel paths do not use equally many filters"):
        sparsity.step()


@pytest.mark.parametrize("build", ["laid_out", "shiftwise"])
def test_tiles_out_of_use_leave_the_convolution_of_the_shift_form(build: str) -> None:
    torch.manual_seed(0)
    if build == "laid_out":
        module = convert(nn.Conv2d(4, 4, 15, padding=7, groups=4), SWConfig(tile=3, form="shift")).double()
        holders = [module.branches[0]]
    else:
        module = SWConv2d(4, 51, ghost=0.0, masked=True, form="shift", dtype=torch.float64)
        holders = module.paths
    x = torch.randn(2, 4, 12, 10, dtype=torch.float64)
    channels, tiles = holders[0].tile_count
    used = torch.zeros(channels, tiles, dtype=torch.bool)
    used[0, [1, 3, 4]] = used[2, [0, 2]] = True  # the fullest channel has three
    for holder in holders:
        holder.set_mask(used)

    def shares() -> list[int]:
        call = Call((9, 9), (9, 9), (1, 1), torch.float32)
        plan = prepare_shift([branch.placed((0, 0), fold=False) for branch in module.parts()][:1], call)
        return [group.tiles for group in plan]

    def agrees() -> bool:
        module.form = "shift"
        y = module(x)
        module.form = "assembled"
        return torch.allclose(y, module(x), rtol=0, atol=1e-12)

    assert shares() == [3]
    assert agrees()
    module(x).sum().backward()
    grad = module.branches[0].bank.grad if build == "laid_out" else module.paths[0].weight.grad.unflatten(0, (4, -1))
    assert torch.equal(grad.reshape(channels, tiles, -1).abs().sum(2) > 0, used)
    holders[0].mask[1, :5] = True  # grown, in place
    assert shares() == [5]
    assert agrees()
    holders[0].explores = True
    assert shares() == [tiles]
    assert agrees()
    assert copy.deepcopy(module)(x).equal(module(x))
