"""verify: what it measures, what it takes, what it refuses, and that it leaves the models as they were."""

import copy
import io
import json
import math
import sys
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sw_transplant.check.images import ArrayImages, load_images
from sw_transplant.check.model_input import ModelInput
from sw_transplant.check.verify import BOUNDS, TF32_BOUND, Count, VerificationError, bound_for, verify

Two = namedtuple("Two", "early late")


@dataclass
class Plain:
    features: torch.Tensor


class Net(nn.Module):
    """A convolution, dropout (random in train mode) and a classifier of 7 classes."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


class Returns(nn.Module):
    """Returns whatever a function makes of its images; `scale` is its one parameter."""

    def __init__(self, function, scale: float = 1.0) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x, **others):
        return self.function(x * self.scale, **others)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(count: int, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def flags(*models: nn.Module) -> list[bool]:
    return [module.training for model in models for module in model.modules()]


def perturbed(model: nn.Module, by: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + by)
    return other


# ---- the numbers


def test_error_is_the_norm_over_all_images_not_the_mean_over_batches():
    x = torch.cat([torch.full((3, 3, 4, 4), 1.0), torch.full((1, 3, 4, 4), 10.0)])
    shifted = Returns(lambda x: x + (x > 5) * 2.0)
    report = verify(Returns(lambda x: x), shifted, x, batch_size=2)
    numbers = 3 * 4 * 4
    expected = math.sqrt(numbers * 2.0**2) / math.sqrt(numbers * (3 * 1.0 + 100.0))
    (out,) = report.outputs
    assert out.name == "output"
    assert out.relative_rms == pytest.approx(expected, rel=1e-12)
    assert out.max_abs == 2.0
    assert report.images == 4
    assert not report.ok


def test_error_is_relative_to_the_original():
    one, two = Returns(lambda x: x), Returns(lambda x: x, 2.0)
    assert verify(one, two, images(2), bounds=1.0).outputs[0].relative_rms == pytest.approx(1.0)
    assert verify(two, one, images(2), bounds=1.0).outputs[0].relative_rms == pytest.approx(0.5)


def test_errors_below_float32_are_still_measured():
    a, b = Returns(lambda x: x / 3).double(), Returns(lambda x: x / 3 * (1 + 1e-13)).double()
    report = verify(a, b, images(2))
    assert report.dtype == "float64"
    assert report.bound == BOUNDS[torch.float64]
    assert report.outputs[0].relative_rms == pytest.approx(1e-13, rel=0.01)
    assert report.ok


def test_zero_outputs():
    zero, one = Returns(torch.zeros_like), Returns(torch.ones_like)
    assert verify(zero, zero, images(1)).outputs[0].relative_rms == 0.0
    report = verify(zero, one, images(1))
    assert report.outputs[0].relative_rms == math.inf
    assert not report.ok


def test_equal_models_pass_and_a_perturbed_one_fails(net):
    x = images(10)
    same = verify(net, copy.deepcopy(net), x)
    assert same.ok
    assert same.failures == ()
    assert same.outputs[0].relative_rms == 0.0
    assert same.raise_if_failed() is None
    other = verify(net, perturbed(net, 1e-4), x)
    assert not other.ok
    with pytest.raises(
        VerificationError, match=r"float32 on cpu.*output: relative RMS error .*e-0.; the bound is 1e-05"
    ):
        other.raise_if_failed()
    assert verify(net, perturbed(net, 1e-4), x, bounds=0.1).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["original", "converted", "both"])
def test_nan_and_infinity_fail(value, where):
    def spoil(x):
        x = x.clone()
        x[-1, 0, 0, 0] = value
        return x

    spoilt, fine = Returns(spoil), Returns(lambda x: x)
    models = {"original": (spoilt, fine), "converted": (fine, spoilt), "both": (spoilt, spoilt)}[where]
    report = verify(*models, images(4), batch_size=2, bounds=1e9)
    assert report.outputs[0].not_finite == 2 * (2 if where == "both" else 1)  # the last image of each of two batches
    assert not report.ok
    assert "NaN or infinite" in report.failures[0]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_nan_in_an_early_batch_is_not_forgotten():
    batches = iter([math.nan, 0.0])
    report = verify(Returns(lambda x: x), Returns(lambda x: x + next(batches)), images(4), batch_size=2)
    assert math.isnan(report.outputs[0].relative_rms)
    assert math.isnan(report.outputs[0].max_abs)


def test_norms_are_added_up_in_float64():
    big = Returns(lambda x: torch.full_like(x, 1e4).half()).half()
    report = verify(big, big, images(2))  # the square of 1e4 is infinite in float16
    assert report.ok
    assert report.outputs[0].relative_rms == 0.0


# ---- classes and labels


def logits_of(rows: list[list[float]]) -> nn.Module:
    """A model whose logits are the given rows, chosen by the first pixel of each image."""
    table = torch.tensor(rows)
    return Returns(lambda x: table[x[:, 0, 0, 0].long()])


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_counts_on_constructed_logits():
    rows = torch.eye(7)[[0, 1, 2, 3]] * 9 + torch.arange(7) * -0.1  # classes 0..3; then 0, 1, ... are the next likely
    other = rows.clone()
    other[3] = torch.eye(7)[5] * 9  # image 3 changes its class from 3 to 5
    labels = torch.tensor([0, 1, 6, 5])
    report = verify(logits_of(rows.tolist()), logits_of(other.tolist()), (numbered(4), labels), batch_size=3)
    assert report.same_top1 == Count(3, 4)
    assert report.same_top1.share == 0.75
    assert (report.top1_original, report.top1_converted) == (Count(2, 4), Count(3, 4))
    # Image 2 (label 6) has 6 as the least likely class; image 3 (label 5) has 3, 0, 1, 2, 4 before 5 in the original.
    assert (report.top5_original, report.top5_converted) == (Count(2, 4), Count(3, 4))


def test_two_classes_have_a_top5():
    report = verify(logits_of([[1.0, 0.0]]), logits_of([[1.0, 0.0]]), (numbered(1), torch.tensor([1])))
    assert report.top1_original == Count(0, 1)
    assert report.top5_original == Count(1, 1)


def test_swapped_near_ties_within_the_bound_are_shown_but_no_failure():
    report = verify(logits_of([[1.0, 1.000001]]), logits_of([[1.000001, 1.0]]), numbered(1))
    assert report.same_top1 == Count(0, 1)
    assert report.ok


def test_classes_are_read_from_logits_before_other_outputs():
    def outputs(x):
        return {"features": -x.mean((2, 3)), "logits": x.mean((2, 3))}

    model = Returns(outputs)
    x = images(6)
    labels = x.mean((2, 3)).argmax(1)
    assert verify(model, model, (x, labels)).top1_original == Count(6, 6)
    two = Returns(lambda x: tuple(outputs(x).values()))
    assert verify(two, two, x).same_top1 is None


def test_labelled_and_unlabelled_batches_may_mix(net):
    report = verify(net, net, [images(3), (images(2), torch.zeros(2, dtype=torch.long))])
    assert report.images == 5
    assert report.same_top1 == Count(5, 5)
    assert report.top1_original.of == 2


def test_labels_may_be_a_list_or_small_integers(net):
    labels = [0, 1, 2]
    expected = verify(net, net, (images(3), torch.tensor(labels))).top1_original
    for form in (labels, torch.tensor(labels, dtype=torch.uint8), torch.tensor(labels).numpy()):
        assert verify(net, net, (images(3), form)).top1_original == expected


# ---- outputs


def test_nested_outputs_have_path_names():
    def outputs(x):
        return {
            "logits": x.mean((2, 3)),
            "hidden_states": (x, x * 2, None),
            "pair": Two(x, [x]),
            "plain": Plain(x),
            "mask": x > 0,
            "count": 3,
            "nothing": None,
            "spectrum": torch.fft.rfft(x),
        }

    report = verify(Returns(outputs), Returns(outputs), images(2))
    names = [out.name for out in report.outputs]
    assert names == [
        "logits",
        "hidden_states[0]",
        "hidden_states[1]",
        "pair.early",
        "pair.late[0]",
        "plain.features",
        "spectrum",
    ]
    assert report.not_compared == ("mask", "count")
    assert "mask, count" in str(report)
    assert report.same_top1 == Count(2, 2)


def test_imaginary_parts_count():
    a, b = Returns(lambda x: torch.complex(x, x)), Returns(lambda x: torch.complex(x, 2 * x))
    assert verify(a, b, images(2)).outputs[0].relative_rms == pytest.approx(math.sqrt(0.5))


def test_only_the_output_that_differs_fails():
    a, b = Returns(lambda x: (x, x + 1)), Returns(lambda x: (x, x + 2))
    report = verify(a, b, images(2))
    assert [out.name for out in report.outputs] == ["output[0]", "output[1]"]
    assert len(report.failures) == 1
    assert report.failures[0].startswith("output[1]:")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda x: {"logits": x}, r"the original returns logits, mask and the converted model logits"),
        (lambda x: {"logits": x, "mask": None}, r"the original returns logits, mask and"),
        (lambda x: {"logits": x[:, :1], "mask": x > 0}, r"logits is torch.float32 \(2, 3, 8, 8\).*\(2, 1, 8, 8\)"),
        (lambda x: {"logits": x, "mask": 1}, r"mask is torch.bool \(2, 3, 8, 8\) from the original and a int"),
        (lambda x: x, r"the converted model output;"),
    ],
)
def test_other_structure_or_shape_is_an_error(other, message):
    with pytest.raises(ValueError, match=message):
        verify(Returns(lambda x: {"logits": x, "mask": x > 0}), Returns(other), images(2))


def test_no_floating_point_output_is_an_error():
    model = Returns(lambda x: x > 0)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        verify(model, model, images(2))


# ---- data


@pytest.mark.parametrize(
    "data",
    [
        images(5),
        (images(5), torch.arange(5)),
        [images(5), None],
        [images(2), images(3)],
        iter([images(2), images(3)]),
        [[images(2)], [images(3)]],
        DataLoader(TensorDataset(images(5), torch.arange(5)), batch_size=2),
        DataLoader(TensorDataset(images(5)), batch_size=2),
        {"pixel_values": images(5), "labels": torch.arange(5)},
        [{"pixel_values": images(2)}, {"pixel_values": images(3)}],
        ArrayImages(images(5), torch.arange(5), ModelInput(), 2),
    ],
    ids=[
        "tensor",
        "pair",
        "pair without labels",
        "list",
        "iterator",
        "list of singles",
        "loader",
        "unlabelled loader",
        "dict",
        "list of dicts",
        "ArrayImages",
    ],
)
def test_every_form_of_data(net, data):
    report = verify(net, net, data, batch_size=2)
    assert report.images == 5
    assert report.ok


def test_other_entries_of_a_dict_reach_the_model_and_labels_do_not():
    seen = []

    def function(x, **others):
        seen.append(others)
        return x

    batch = {
        "pixel_values": images(2),
        "labels": torch.zeros(2, dtype=torch.long),
        "mask": torch.ones(2, dtype=torch.long),
        "weights": [torch.ones(2, dtype=torch.float64)],
        "flag": True,
    }
    model = Returns(lambda x, **others: function(x, **others).mean((2, 3)))
    verify(model, model, batch)
    assert [set(others) for others in seen] == [{"mask", "weights", "flag"}] * 2
    assert seen[0]["mask"].dtype == torch.long
    assert seen[0]["weights"][0].dtype == torch.float32
    assert seen[0]["flag"] is True


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data is a int; expected images"),
        ([], "data is empty"),
        (images(0), r"float32 \(0, 3, 8, 8\) for images"),
        (images(2)[0], r"float32 \(3, 8, 8\) for images"),
        (torch.tensor(1.0), r"float32 \(\) for images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8 .* for images; expected a floating-point tensor"),
        (["a.jpg"], "a str for images"),
        ([{"inputs": images(2)}], "a NoneType for images"),
        ([(images(2), torch.zeros(2), 1)], "a tuple for images"),
        ((images(2), torch.zeros(3, dtype=torch.long)), r"2 images has torch.int64 \(3,\) for labels"),
        ((images(2), torch.zeros(2, 7)), r"torch.float32 \(2, 7\) for labels"),
        ((images(2), torch.zeros(2)), r"torch.float32 \(2,\) for labels"),
        ((images(2), "ab"), "a str for labels"),
        ([{"pixel_values": images(2), "labels": [{"boxes": 1}]}], "a list for labels"),
        ((images(2), torch.tensor([0, 7])), "labels run from 0 to 7 .* expected 0 to 6"),
        ((images(2), torch.tensor([0, -1])), "labels run from -1 to 0"),
    ],
)
def test_data_of_other_forms_is_refused(net, data, message):
    with pytest.raises(ValueError, match=message):
        verify(net, net, data)


def test_labels_without_logits_are_refused():
    model = Returns(lambda x: x)
    with pytest.raises(ValueError, match=r"none of the outputs \(output\) is the logits"):
        verify(model, model, (images(2), torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_batches": 0}, "max_batches is 0"),
        ({"bounds": -1.0}, "bounds is -1.0"),
        ({"bounds": math.nan}, "bounds is nan"),
        ({"input_size": (1, 2, 3, 4)}, r"input_size is \(1, 2, 3, 4\)"),
        ({"input_size": 0}, "input_size is 0"),
        ({"data": images(1), "input_size": 8}, "leave one of the two out"),
    ],
)
def test_bad_arguments(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(net, net, **arguments)


def test_only_modules_are_taken(net):
    with pytest.raises(ValueError, match="converted is a function"):
        verify(net, lambda x: x, images(1))


def test_batch_size_and_max_batches():
    sizes = []

    def note(x):
        sizes.append(len(x))
        return x

    model = Returns(note)
    assert verify(model, Returns(lambda x: x), images(7), batch_size=3).images == 7
    assert sizes == [3, 3, 1]
    drawn = (images(2) for _ in iter(int, 1))  # endless
    assert verify(model, model, drawn, max_batches=2).images == 4


def test_noise_is_two_seeded_batches_of_the_models_own_size():
    seen = []

    def note(x):
        seen.append(x)
        return x.mean((2, 3))

    model = Returns(note)
    model.pretrained_cfg = {"input_size": (3, 12, 10)}
    same = Returns(lambda x: x.mean((2, 3)))
    assert verify(model, same, batch_size=2).images == 4
    assert [tuple(x.shape) for x in seen] == [(2, 3, 12, 10)] * 2
    assert not torch.equal(seen[0], seen[1])
    first = seen[0]
    for seed, expected in ((0, True), (1, False)):
        seen.clear()
        verify(model, same, batch_size=2, seed=seed)
        assert torch.equal(seen[0], first) is expected
    for size, shape in ((6, (3, 6, 6)), ((5, 7), (3, 5, 7)), ((1, 5, 7), (1, 5, 7))):
        seen.clear()
        verify(model, same, batch_size=2, input_size=size)
        assert tuple(seen[0].shape[1:]) == shape


# ---- the models stay as they were


def test_models_run_in_eval_mode_and_get_every_flag_back(net):
    other = copy.deepcopy(net)
    net.train()
    net.norm.eval()  # a frozen BatchNorm
    other.eval()
    other.drop.train()
    before, state = flags(net, other), copy.deepcopy(net.state_dict())
    assert verify(net, other, images(4)).ok  # dropout in train mode would differ from the eval mode of the other
    assert flags(net, other) == before
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())  # running statistics


def test_flags_and_random_state_come_back_after_an_error(net):
    class Fails(nn.Module):
        def forward(self, x):
            assert not self.training
            torch.rand(3)
            raise RuntimeError("in the model")

    fails = Fails()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the model"):
        verify(net, fails, images(2))
    assert all(flags(net, fails))
    assert torch.equal(torch.get_rng_state(), state)


def test_train_is_called_for_models_that_do_more_in_it():
    class Merges(Net):
        merged = False

        def train(self, mode: bool = True):
            self.merged = not mode
            return super().train(mode)

    model = Merges()
    verify(model, model, images(2))
    assert model.training
    assert not model.merged


def test_both_models_see_the_same_random_numbers():
    def noisy(x):
        return x + torch.rand_like(x)

    state = torch.get_rng_state()
    report = verify(Returns(noisy), Returns(noisy), images(4), batch_size=2)
    assert report.outputs[0].relative_rms == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_what_is_random_inside_the_models():
    drawn = []

    def noisy(x):
        drawn.append(torch.rand(1).item())
        return x

    for seed in (0, 0, 1):
        torch.rand(1)  # the state outside plays no part
        verify(Returns(noisy), Returns(noisy), images(1), seed=seed)
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[4]


def test_a_model_that_works_in_place_changes_nobodys_images():
    x = images(2)
    expected = x.clone()
    assert verify(Returns(lambda x: x), Returns(lambda x: x), x).ok
    in_place = nn.Sequential(nn.ReLU(inplace=True))
    assert verify(in_place, nn.Sequential(nn.ReLU()), x).ok
    assert torch.equal(x, expected)


def test_dtype_runs_copies(net):
    parameters = {name: (id(p), p.dtype) for name, p in net.named_parameters()}
    report = verify(net, perturbed(net, 1e-4), images(4), dtype=torch.bfloat16, device="cpu")
    assert (report.dtype, report.bound, report.device) == ("bfloat16", BOUNDS[torch.bfloat16], "cpu")
    assert {name: (id(p), p.dtype) for name, p in net.named_parameters()} == parameters
    assert verify(net, copy.deepcopy(net), images(4), dtype=torch.float64).dtype == "float64"


def test_no_gradients_and_no_inference_tensors():
    kept = []

    def note(x):
        kept.append(x)
        return x

    model = Returns(note)
    verify(model, model, images(1))
    assert not any(x.requires_grad or x.is_inference() for x in kept)


# ---- bounds


def test_bounds_of_the_design():
    assert BOUNDS == {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    for dtype, bound in BOUNDS.items():
        assert bound_for(dtype) == bound
    with pytest.raises(NotImplementedError, match=r"no bound for torch\.int8"):
        bound_for(torch.int8)


def test_tf32_counts_on_cuda_only(monkeypatch):
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    try:
        for conv, product, bound in (
            ("ieee", "ieee", BOUNDS[torch.float32]),
            ("tf32", "ieee", TF32_BOUND),
            ("ieee", "tf32", TF32_BOUND),
        ):
            convolutions.fp32_precision, products.fp32_precision = conv, product
            assert bound_for(torch.float32, "cuda") == bound
            assert bound_for(torch.float32, "cpu") == BOUNDS[torch.float32]
            assert bound_for(torch.float64, "cuda:0") == BOUNDS[torch.float64]
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


def test_the_coarsest_dtype_sets_the_bound(net):
    half = copy.deepcopy(net).bfloat16()
    report = verify(net, half, images(4))
    assert report.bound == BOUNDS[torch.bfloat16]
    assert 0 < report.outputs[0].relative_rms < report.bound
    with torch.autocast("cpu", torch.bfloat16):
        assert verify(net, net, images(2)).bound == BOUNDS[torch.bfloat16]


# ---- the report


def test_report_prints_narrow_plain_tables(net, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    labels = torch.arange(4)
    long = "a_very_long_name_" * 8
    text = str(verify(Returns(lambda x: {long: x, "b[0]": x}), Returns(lambda x: {long: x, "b[0]": x + 1}), images(4)))
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii()
    assert "\x1b" not in text
    assert text.startswith("FAILED: not the same function on 4 images, float32 on cpu")
    assert "b[0]" in text
    letters = "".join(c for c in text if c.isalnum() or c == "_")
    assert "a_very_long_name_" * 3 in letters  # folded, not cut off
    text = str(verify(net, net, (images(4), labels)))
    right = sum(net.eval()(images(4)).argmax(1) == labels)
    assert text.startswith("OK: the same function on 4 images")
    assert "same class from both models: 4 of 4 (100.00%)" in text
    assert f"{right} of 4 ({right / 4:.2%})" in text


def test_report_as_json(net):
    report = verify(net, net, (images(4), torch.arange(4)))
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["ok"] is True
    (output,) = read["outputs"]
    assert {name: value for name, value in output.items() if value is not None} == {
        "name": "output",
        "relative_rms": 0.0,
        "max_abs": 0.0,
        "not_finite": 0,
    }
    assert read["same_top1"] == {"count": 4, "of": 4, "share": 1.0}
    assert read["images"] == 4
    assert read["images_per_second_original"] > 0
    assert json.loads(json.dumps(verify(net, net, images(1)).to_dict()))["top1_original"] is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal_only(net, monkeypatch):
    log, terminal, quiet = io.StringIO(), Terminal(), Terminal()
    monkeypatch.setenv("TERM", "xterm")
    for stream, wanted in ((log, True), (terminal, True), (quiet, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        verify(net, net, images(4), batch_size=1, progress=wanted)
    assert log.getvalue() == quiet.getvalue() == ""
    assert "comparing" in terminal.getvalue()


# ---- real libraries


@pytest.mark.parametrize("features_only", [False, True])
def test_timm(features_only):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", features_only=features_only)
    names = [out.name for out in verify(model, copy.deepcopy(model), batch_size=1).outputs]
    assert names == ([f"output[{i}]" for i in range(len(names))] if features_only else ["output"])
    assert not verify(model, perturbed(model, 1e-2), batch_size=1).ok


def test_hugging_face_outputs_and_keywords():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        depths=[1, 1], hidden_sizes=[8, 16], num_stages=2, image_size=32, num_labels=6, output_hidden_states=True
    )
    model = transformers.ConvNextForImageClassification(config)
    batch = {"pixel_values": torch.randn(3, 3, 32, 32), "labels": torch.tensor([0, 5, 2])}
    report = verify(model, copy.deepcopy(model), batch)
    names = [out.name for out in report.outputs]
    assert names[0] == "logits"
    assert "hidden_states[2]" in names
    assert "loss" not in names
    assert report.same_top1 == Count(3, 3)
    assert report.top1_original.of == 3
    noise = verify(model, perturbed(model, 1e-2), batch_size=2)
    assert noise.images == 4
    assert not noise.ok
    features = transformers.ConvNextModel(config)
    report = verify(features, features, batch_size=2)
    assert "pooler_output" in [out.name for out in report.outputs]
    assert report.same_top1 is None  # pooled features are no classes


def test_cifar10_logits_against_those_stored_beside_the_images(shared):
    """The counts come out as published for the stored logits, through the whole path from file to report."""
    import numpy as np

    file = shared / "data" / "cifar10_test_1000.npz"
    logits = torch.from_numpy(np.load(file)["logits"])

    def replay(sign: int) -> nn.Module:
        batches = iter((sign * logits).split(100))
        return Returns(lambda x: next(batches))

    data = load_images(file, ModelInput(shape=(3, 96, 96)), batch_size=100)
    report = verify(replay(1), replay(-1), data)
    assert report.images == 1000
    assert report.top1_original == Count(834, 1000)
    assert report.same_top1 == Count(0, 1000)
    assert report.top1_converted.count < 20
    assert report.outputs[0].relative_rms == pytest.approx(2.0)


@pytest.mark.gpu
def test_device_runs_copies_on_the_gpu(net):
    state = torch.cuda.get_rng_state()
    noisy = Returns(lambda x: x + torch.rand_like(x))
    report = verify(noisy, copy.deepcopy(noisy), images(4), device="cuda")
    assert report.device.startswith("cuda")
    assert report.outputs[0].relative_rms == 0.0
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert next(noisy.parameters()).device.type == "cpu"
    moved = copy.deepcopy(net).cuda()
    assert verify(net, moved, images(4)).ok  # each where it is
