"""Calibration: from images of any form to modules whose responses are those of the original, or to a clear error."""

import json
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sw_transplant import SWConfig, convert, load, save, summary
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery.calibration import Calibration
from sw_transplant.surgery.calibration.budget import share_out
from sw_transplant.surgery.calibration.ghosts import cheapest, exchange
from sw_transplant.surgery.calibration.images import read_images
from sw_transplant.surgery.calibration.sensitivity import sensitivities
from sw_transplant.surgery.calibration.statistics import set_statistics
from tests.sampling import sample
from tests.small_models import Residual, conv


def config(**changes):
    return SWConfig(**{"mode": "shiftwise", "tile": 3, "edges": 2, "ghost": 0.0, **changes})


def quick(images, **changes):
    return Calibration(images, **{"candidates": 1, "swaps": 0, "held_out": 0.0, **changes})


class Net(nn.Module):
    """Two blocks of a depthwise and two pointwise layers, and a head."""

    def __init__(self, channels=8, size=13):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(channels, size) for _ in range(2)])
        self.head = nn.Linear(channels, 5)

    def forward(self, pixel_values):
        return self.head(self.blocks(pixel_values).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, channels, size):
        super().__init__()
        self.large = conv(channels, size)
        self.first, self.act = nn.Conv2d(channels, 16, 1), nn.GELU()
        self.second = nn.Conv2d(16, channels, 1)

    def forward(self, x):
        return x + 0.5 * self.second(self.act(self.first(self.large(x))))


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net().eval()


def images(count=12, size=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 8, size, size, generator=generator)
    return nn.functional.avg_pool2d(noise, 5, 1, 2) * 5


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@torch.no_grad()
def test_responses_come_closer_than_by_kernels(net):
    x, others = images(40), images(40, seed=1)
    by_kernels = convert(net, config())
    settings = quick(x)
    by_responses = convert(net, config(), calibration=settings)
    wanted = net.blocks[0].large(others)
    missed = [distance(model.blocks[0].large(others), wanted) for model in (by_responses, by_kernels)]
    assert missed[0] < 0.85 * missed[1]
    assert [layer.path for layer in settings.report.layers] == ["blocks.0.large", "blocks.1.large"]
    first = settings.report.layers[0]
    wanted, got = net.blocks[0].large(x), by_responses.blocks[0].large(x)
    assert first.response_error == pytest.approx(float((got - wanted).square().sum() / wanted.square().sum()), rel=1e-3)
    assert by_responses.blocks[0].large.spec.response_error == first.response_error
    assert f"{first.response_error:.1%}" in summary(by_responses)
    assert "blocks.0.large" in str(settings.report)


@torch.no_grad()
def test_a_layer_makes_up_for_those_before(net):
    x = images()
    converted = convert(net, config(), calibration=quick(x, mix=0.0))
    wanted = net.blocks[1].large(net.blocks[0](x))
    got = converted.blocks[1].large(converted.blocks[0](x))
    alone = convert(net.blocks[1].large, config(), calibration=quick(net.blocks[0](x), mix=0.0))
    assert distance(got, wanted) < distance(alone(converted.blocks[0](x)), wanted)


FORMS = {
    "pieces": lambda x: list(x.split(5)),
    "pairs": lambda x: [(part, torch.zeros(len(part))) for part in x.split(5)],
    "dicts": lambda x: [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in x.split(5)],
    "one dict": lambda x: {"pixel_values": x},
    "a loader": lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 5),
    "an iterator": lambda x: iter(x.split(5)),
    "a function": lambda x: lambda model: [model(part) for part in x.split(5)],
    "a function with names": lambda x: lambda model: model(pixel_values=x),
}


@pytest.mark.parametrize("form", sample(FORMS, ["pairs", "a loader", "a function with names"], unpack=False))
def test_images_of_every_form_give_the_same(net, form):
    x = images()
    whole = form in ("one dict", "a function with names")
    one = convert(net, config(ghost=0.25), calibration=quick(x, batch_size=16 if whole else 5))
    other = convert(net, config(ghost=0.25), calibration=quick(FORMS[form](x)))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_same_call_gives_the_same_model_and_leaves_the_original(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    net.train()
    frozen = net.head.weight.requires_grad_(False)
    one, other = (convert(net, config(ghost=0.25), calibration=quick(images(), refit=True)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert net.blocks[0].large.training
    assert one.training
    assert not frozen.requires_grad
    assert net.blocks[0].large.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*net.modules(), *one.modules()))


def test_in_place_gives_the_same(net):
    x = images()
    copy = convert(net, config(), calibration=quick(x, refit=True))
    body = net.blocks
    assert convert(net, config(), calibration=quick(x, refit=True), inplace=True) is net
    assert net.blocks is body
    for name, tensor in copy.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


BAD = {
    "a file name": ("images.pt", "got str"),
    "a number": (7, "got int"),
    "no images": (torch.zeros(0, 8, 9, 9), r"tensor \(0, 8, 9, 9\)"),
    "an empty list": ([], "no images"),
    "whole numbers": (torch.zeros(2, 8, 9, 9, dtype=torch.uint8), "uint8"),
    "NaN": (torch.full((2, 8, 9, 9), torch.nan), "NaN or infinity"),
    "NaN in a batch": ([torch.full((2, 8, 9, 9), torch.nan)], r"blocks.0.large: .* in the layer's input"),
    "single images": (list(torch.zeros(2, 8, 9, 9)), r"batch 0 has a torch.float32 tensor \(8, 9, 9\)"),
    "an array": (np.zeros((2, 8, 9, 9)), "batch 0 has a ndarray"),
    "no batches": (lambda model: model.blocks(images()[0]), r"blocks.0.large: .* as \(8, 9, 9\), .* on batches"),
    "labels alone": ([torch.zeros(4, dtype=torch.long)], "batch 0 has a torch.int64 tensor"),
    "too few": (torch.randn(1, 8, 5, 5), "25 positions .* 45 taps"),
}

BAD_CASES = [(case, inplace) for case in BAD for inplace in (False, True)]


@pytest.mark.parametrize(("case", "inplace"), sample(BAD_CASES, [(case, True) for case in BAD]))
def test_bad_images_are_refused_before_anything_changes(net, case, inplace):
    given, message = BAD[case]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(net, config(), calibration=given, inplace=inplace)
    assert type(net.blocks[0].large) is nn.Conv2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Unused(nn.Sequential):
    def forward(self, x):
        return self[0](x)


def test_layers_that_are_not_reached_are_named():
    model = Unused(conv(8, 9), conv(8, 9))
    with pytest.raises(ValueError, match=r"do not reach \['1'\]"):
        convert(model, config(), calibration=images(), inplace=True)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("settings", [{"ridge": 0.0}, {"mix": 2}, {"swaps": -1}, {"candidates": 0}, {"fit": "taps"}])
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"Calibration.{next(iter(settings))}"):
        Calibration(images(), **settings)


def test_calibration_belongs_to_mode_shiftwise(net):
    with pytest.raises(ValueError, match="expected mode 'shiftwise'"):
        convert(net, calibration=images())
    with pytest.raises(ValueError, match="give calibration=images"):
        convert(net, config(ghost_budget="global"))


@torch.no_grad()
@pytest.mark.parametrize("fit", ["responses", "kernels"])
def test_train_mode_starts_from_the_same_function(net, fit):
    x = images(24)
    converted = convert(net, config(ghost=0.25), calibration=quick(x, fit=fit, held_out=0.0)).eval()
    evaluated = converted(x)
    for module in converted.modules():
        if isinstance(module, SWConv2d):
            module.train()
    assert distance(converted(x), evaluated) < 1e-3
    plain = convert(net, config(ghost=0.25)).train()
    assert distance(plain(x), plain.eval()(x)) > 0.05


@torch.no_grad()
def test_statistics_of_a_model_that_was_converted_without_images(net):
    x = images(24)
    converted = convert(net, config(ghost=0.25)).eval()
    evaluated = converted(x)
    set_statistics(converted, x)
    assert distance(converted(x), evaluated) < 1e-5
    assert distance(converted.train()(x), evaluated) < 1e-3
    with pytest.raises(ValueError, match="no module of mode 'shiftwise'"):
        set_statistics(net, x)


@torch.no_grad()
def test_ghosts_are_the_channels_that_are_missed_least():
    torch.manual_seed(0)
    layer = conv(8, 13)
    layer.weight *= 3
    layer.weight[[2, 5]] = 0
    layer.weight[[2, 5], :, 6, 6] = 1
    layer.bias[[2, 5]] = 0
    module = convert(nn.Sequential(layer), config(ghost=0.25), calibration=quick(images()))[0]
    assert module.spec.ghosts == (2, 5)


@torch.no_grad()
def test_one_budget_gives_ghosts_to_the_layers_that_miss_them_least():
    torch.manual_seed(0)
    model = nn.Sequential(conv(8, 13), nn.ReLU(), conv(8, 13)).eval()
    for layer, scale in ((model[0], 0.05), (model[2], 3.0)):
        layer.weight *= scale
        layer.weight[:, :, 6, 6] += 1
    converted = convert(model, config(ghost=0.25, ghost_budget="global"), calibration=quick(images()))
    assert [len(converted[i].spec.ghosts) for i in (0, 2)] == [4, 0]
    by_layer = convert(model, config(ghost=0.25), calibration=quick(images()))
    x = images(seed=1)
    assert distance(converted(x), model(x)) < distance(by_layer(x), model(x))


@torch.no_grad()
def test_what_the_network_loses_by_ghosts_is_tried(net):
    net.blocks[0].second.weight.zero_()  # nothing behind reads this block's large layer
    x, ghosts = images(8), []
    before = net(x)
    for data in (x, lambda model: model(x)):
        converted = convert(net, config(ghost=0.5, ghost_budget="global"), calibration=quick(data))
        ghosts.append([len(block.large.spec.ghosts) for block in converted.blocks])
    assert ghosts == [[6, 2], [6, 2]]
    assert torch.equal(net(x), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_budget_is_shared_out_by_what_ghosts_cost():
    eight = {"a": 8, "b": 8}
    assert share_out({"a": 1.0, "b": 1.0}, eight, 0.5) == {"a": 2, "b": 2}
    assert share_out({"a": 1.0, "b": 3.0}, eight, 0.5) == {"a": 3, "b": 1}  # shares as 1 / growth
    assert share_out({"a": 0.0, "b": 1.0}, eight, 0.7) == {"a": 5, "b": 0}
    assert share_out({"a": 0.0, "b": 1.0}, eight, 1.0) == {"a": 6, "b": 2}  # three quarters of a layer at most
    assert share_out({"a": 1.0, "b": 1.0}, {"a": 4, "b": 8}, 0.5) == {"a": 1, "b": 2}  # shares, not channels
    assert share_out({"a": float("inf"), "b": 1.0}, eight, 0.5) == {"a": 0, "b": 4}
    assert cheapest(torch.tensor([3.0, 1, 2, 1]), 2) == (1, 3)


@torch.no_grad()
def test_channels_make_up_for_each_other(net):
    x = images(40)
    weights = sensitivities(net, read_images(x), {"": net.blocks[0].large}, 123)[0][""]
    wanted, costs, errors = net.blocks[0].large(x), [], []
    for mix in (0.0, 1.0):
        module = convert(net, config(ghost=0.5), calibration=quick(x, mix=mix)).blocks[0].large
        missed = (module.eval()(x) - wanted).transpose(0, 1).flatten(1).double()
        costs.append(float((missed * (weights @ missed)).sum()))
        errors.append(module.spec.response_error)
    assert costs[1] < 0.97 * costs[0]  # of what the network sees of them
    assert errors[1] > errors[0]  # of the responses themselves, each channel does best for itself


@torch.no_grad()
def test_refitted_linear_layers_bring_the_output_closer(net):
    x, others = images(40), images(40, seed=1)
    plain, settings = convert(net, config(ghost=0.5), calibration=quick(x)), quick(x, refit=True)
    refitted = convert(net, config(ghost=0.5), calibration=settings)
    assert distance(refitted(others), net(others)) < 0.8 * distance(plain(others), net(others))
    done = settings.report.layers[0].refitted
    assert [each.path for each in done] == ["blocks.0.first", "blocks.0.second"]
    assert all(each.after < each.before and not each.reason for each in done)


@torch.no_grad()
def test_blocks_are_probed_as_finely_as_their_dtype_is(net):
    x, net = images(40).bfloat16(), net.bfloat16()
    settings = quick(x, refit=True)
    convert(net, config(ghost=0.5), calibration=settings)
    assert [each.path for each in settings.report.refitted] == [
        f"blocks.{i}.{name}" for i in "01" for name in ("first", "second")
    ]
    assert not any(each.reason for layer in settings.report.layers for each in layer.refitted)


def test_a_block_that_does_more_with_its_last_layer_is_not_solved_for(net):
    class Faint(Block):
        def forward(self, x):
            return x + 1e-7 * (super().forward(x) - x)

    class Bent(Block):
        def forward(self, x):
            return torch.relu(super().forward(x))

    for kind, reason in ((Faint, "rounding hides it"), (Bent, "does more with its last")):
        net.blocks[0].__class__ = kind
        settings = quick(images(40), refit=True)
        convert(net, config(), calibration=settings)
        assert any(reason in each.reason for each in settings.report.layers[0].refitted)
    alone = quick(images(40), refit=True)
    convert(nn.Sequential(conv(8, 9), nn.ReLU()), config(), calibration=alone)
    assert "no linear layer" in alone.report.layers[0].refitted[0].reason


def test_agreement_is_counted_on_images_that_were_held_out(net):
    settings = Calibration(images(40), candidates=1, swaps=0, held_out=0.25)
    converted = convert(net, config(), calibration=settings)
    same, of = settings.report.agreement
    assert of == 10
    with torch.no_grad():
        x = images(40)[30:]
        assert same == int((converted(x).argmax(1) == net(x).argmax(1)).sum())
    assert converted.blocks[1].large.spec.agreement == (same, of)
    assert f"{same} of {of}" in summary(converted)
    without = convert(net, config(), calibration=quick(images(40)[:30]))
    assert torch.equal(without.blocks[0].large.bank, converted.blocks[0].large.bank)


def test_outputs_with_logits_and_layers_that_run_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.head = conv(8, 9), nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.large(torch.relu(self.large(x))))
            return SimpleNamespace(logits=self.head(x.mean((2, 3))), other=None)

    torch.manual_seed(0)
    settings = Calibration(images(40), candidates=1, swaps=0)
    convert(Twice().eval(), config(), calibration=settings)
    assert settings.report.layers[0].positions == 36 * 2 * 81
    assert settings.report.agreement[1] == 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("stride", "dtype"),
    sample(
        [(stride, dtype) for stride in (1, 2) for dtype in (torch.float32, torch.float64, torch.bfloat16)],
        [(1, torch.bfloat16), (2, torch.float32)],
    ),
)
def test_a_convolution_alone_of_any_stride_and_dtype(stride, dtype):
    torch.manual_seed(0)
    layer = conv(8, 9, stride=stride).to(dtype)
    x = images(8).to(dtype)
    module = convert(layer, config(), calibration=quick(x))
    assert isinstance(module, SWConv2d)
    assert next(module.parameters()).dtype == dtype
    error = float((module.eval()(x) - layer(x)).float().square().sum() / layer(x).float().square().sum())
    assert error == pytest.approx(module.spec.response_error, rel=0.2 if dtype is torch.bfloat16 else 1e-3)


@torch.no_grad()
def test_maps_of_several_sizes():
    torch.manual_seed(0)
    layer = nn.Sequential(conv(8, 9))
    batches = [images(6, 9), images(6, 12), images(6, 7)]
    module = convert(layer, config(), calibration=quick(batches))
    got = sum(float((module.eval()(x) - layer(x)).square().sum()) for x in batches)
    energy = sum(float(layer(x).square().sum()) for x in batches)
    assert got / energy == pytest.approx(module[0].spec.response_error, rel=1e-3)


def test_saved_and_loaded_with_what_the_calibration_says(net, tmp_path):
    converted = convert(net, config(ghost=0.25), calibration=Calibration(images(40), swaps=0)).eval()
    save(converted, tmp_path)
    loaded = load(Net().eval(), tmp_path)
    x = images(seed=2)
    assert torch.equal(loaded(x), converted(x))
    assert loaded.blocks[0].large.spec == converted.blocks[0].large.spec
    path = tmp_path / "sw_config.json"
    description = json.loads(path.read_text())
    for layer in description["layers"]:  # as folders of earlier versions are
        del layer["shared"]["response_error"], layer["shared"]["agreement"]
    path.write_text(json.dumps(description))
    assert torch.equal(load(Net().eval(), tmp_path)(x), converted(x))


def test_aliases_get_the_same_module():
    torch.manual_seed(0)
    shared = conv(8, 9)
    model = nn.Sequential(shared, nn.ReLU(), shared, Residual(conv(8, 9)))
    converted = convert(model, config(), calibration=quick(images()))
    assert converted[0] is converted[2]
    assert isinstance(converted[3].inner, SWConv2d)


def test_errors_that_cancel_are_found_by_exchanging_ghosts():
    torch.manual_seed(0)
    root = torch.randn(6, 4)
    quadratic, linear = root @ root.T, torch.randn(6)

    def cost(ghosts):
        z = torch.zeros(6)
        z[list(ghosts)] = 1
        return float(2 * linear @ z + z @ quadratic @ z)

    start = (0, 1, 2)
    found = exchange(start, linear, quadratic)
    assert len(found) == 3
    assert cost(found) < cost(start)
    for out in found:
        for into in set(range(6)) - set(found):
            assert cost((set(found) - {out}) | {into}) >= cost(found) - 1e-4


@torch.no_grad()
def test_the_input_is_added_only_where_that_helps():
    torch.manual_seed(0)
    model = nn.Sequential(conv(8, 13), conv(8, 13))
    model[0].weight *= 0.01
    model[1].weight *= 0.01
    model[1].weight[:, :, 6, 6] += 1
    converted = convert(model, config(edges=1), calibration=quick(images(40)))
    assert [converted[i].residual for i in (0, 1)] == [False, True]
    assert converted[0].spec.response_error < 0.95


class Counted(nn.Sequential):
    """Counts its calls, and may fail at one of them."""

    calls, fails_at = 0, 0

    def forward(self, x):
        type(self).calls += 1
        if type(self).calls == type(self).fails_at:
            raise RuntimeError("no")
        return super().forward(x)


def test_one_pass_is_enough_and_no_thread_is_left():
    torch.manual_seed(0)
    threads, Counted.fails_at, calls = threading.active_count(), 0, []
    for layers in (1, 3):
        model = nn.Sequential(Counted(nn.Conv2d(8, 8, 1)), *[conv(8, 9) for _ in range(layers)], nn.ReLU())
        Counted.calls = 0
        convert(model, config(), calibration=quick(images(12), batch_size=4))
        calls.append(Counted.calls)
    assert calls[0] == calls[1] < 15
    assert threading.active_count() == threads
    Counted.fails_at = Counted.calls + calls[0] - 1
    with pytest.raises(RuntimeError, match="no"):
        convert(model, config(), calibration=quick(images(12), batch_size=4))
    assert threading.active_count() == threads
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_images_that_would_take_too_much_memory_to_wait_run_again(net, monkeypatch):
    waiting = convert(net, config(ghost=0.25), calibration=quick(images()))
    monkeypatch.setattr("sw_transplant.surgery.calibration.paused._NUMBERS", 0)
    again = convert(net, config(ghost=0.25), calibration=quick(images()))
    assert all(
        torch.equal(a, b) for a, b in zip(waiting.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_maps_larger_than_what_may_be_kept_are_calibrated_with_one_image_of_them(net, monkeypatch):
    data = images(count=3, size=27)
    whole = convert(net, config(ghost=0.25), calibration=quick(data))
    monkeypatch.setattr("sw_transplant.surgery.calibration.compensation._NUMBERS", 1)
    one = convert(net, config(ghost=0.25), calibration=quick(data))
    alone = convert(net, config(ghost=0.25), calibration=quick(data, mix=0.0))
    with torch.no_grad():
        wanted = net(data)
        errors = [float((model(data) - wanted).square().mean()) for model in (whole, one, alone)]
    assert errors[1] < min(1.5 * errors[0], errors[2])


def test_a_call_without_images_teaches_a_layer_nothing(net):
    def run(model, empty):
        if empty:
            model(images()[:0])
        model(images())

    both = [convert(net, config(), calibration=quick(partial(run, empty=empty))) for empty in (False, True)]
    torch.testing.assert_close(both[0](images()), both[1](images()), rtol=0, atol=0)


class Undifferentiable(Net):
    """Runs, but not with gradients."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, pixel_values):
        return torch.from_numpy(super().forward(self.norm(pixel_values)).numpy())


def test_a_model_without_gradients_is_calibrated_and_the_report_says_what_that_costs():
    torch.manual_seed(3)
    model = Undifferentiable().eval()
    for data in (images(), "synthetic"):
        with torch.no_grad():
            settings = quick(data, input_size=(8, 9, 9))
            converted = convert(model, config(ghost=0.25), calibration=settings)
            assert distance(converted(images()), model(images())) < 0.2
        note = str(settings.report).splitlines()[-1]
        assert note.startswith("No gradients at blocks.0.large, blocks.1.large (Can't call numpy() on Tensor")
    settings = quick(images())
    convert(Net().eval(), config(), calibration=settings)
    assert not settings.report.notes


def test_inference_mode_changes_nothing(net):
    for data in (images(), "synthetic"):
        made = []
        for mode in (False, True):
            with torch.inference_mode(mode):
                model = convert(net, config(ghost=0.25), calibration=quick(data, input_size=(8, 9, 9), count=8))
                made.append(model(images()))
        assert torch.equal(*made)
