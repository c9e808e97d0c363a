"""verify in 16 bits: rounding passes however deep the network, a wrong tap fails, and the report says which it is."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import sw_transplant as sw
from sw_transplant.check.report import FACTOR, SAME_FUNCTION
from sw_transplant.check.verify import BOUNDS, verify
from sw_transplant.forms import FORMS

BFLOAT16 = BOUNDS[torch.bfloat16]


def deep(depth: int = 12, channels: int = 12) -> nn.Module:
    """An embedding network whose channels have scales as uneven as trained ones, with statistics that fit them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2)]
    for _ in range(depth):
        depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        layers += [depthwise, nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1), nn.GELU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(channels))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.exp(torch.randn(module.out_channels, 1, 1, 1)))
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.momentum = 1.0
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return deep()


def compared(original: nn.Module, converted: nn.Module, **options):
    report = verify(original, converted, **{"input_size": 32, "batch_size": 4, **options})
    (output,) = report.outputs
    return report, output


def with_one_wrong_tap(converted: nn.Module, by: float = 0.1) -> nn.Module:
    broken = copy.deepcopy(converted)
    layer = next(module for module in broken.modules() if isinstance(module, sw.ShiftwiseConv2d))
    with torch.no_grad():
        layer.branches[0].bank[1, 0, 2, 2] += by
    return broken


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_rounding_passes_in_every_form_and_a_wrong_tap_fails(network: nn.Module, form: str) -> None:
    original = copy.deepcopy(network).bfloat16()
    converted = sw.convert(original, sw.SWConfig(form=form))
    report, output = compared(original, converted)
    assert report.ok, report
    assert report.reference == "float64"
    assert output.original_error > BFLOAT16  # a fixed bound would call the original another function than itself
    assert output.converted_error <= FACTOR * output.original_error + BFLOAT16
    assert output.function_error < 1e-12
    if form == "shift":
        assert output.relative_rms > BFLOAT16
    report, output = compared(original, with_one_wrong_tap(converted))
    assert not report.ok
    assert output.function_error > SAME_FUNCTION
    assert "computed in float64" in report.failures[0]


def test_what_rounding_hides_is_still_seen(network: nn.Module) -> None:
    """Both models in bfloat16 are as far from float64 as ever; the wide copies tell them apart."""
    original = copy.deepcopy(network).bfloat16()
    report, output = compared(original, with_one_wrong_tap(sw.convert(original), by=1e-2))
    assert output.converted_error <= report.allowed(output)
    assert not report.ok


def test_float16_and_autocast(network: nn.Module) -> None:
    original = copy.deepcopy(network).half()
    assert compared(original, sw.convert(original))[0].ok
    with torch.autocast("cpu", torch.bfloat16):
        report, output = compared(network, sw.convert(network, sw.SWConfig(form="shift")))
        assert (report.ok, report.dtype, report.reference) == (True, "bfloat16", "float64")
        assert output.function_error < 1e-12  # not under autocast
        assert torch.is_autocast_enabled("cpu")
        assert not compared(network, with_one_wrong_tap(sw.convert(network)))[0].ok


def test_float32_and_given_bounds_compare_the_two_models_alone(network: nn.Module) -> None:
    converted = sw.convert(network)
    report, output = compared(network, converted)
    assert (report.ok, report.reference, output.original_error) == (True, None, None)
    assert report.reasons == (f"output: relative RMS error {output.relative_rms:.2e}, within 1e-05.",)
    assert not compared(network, with_one_wrong_tap(converted, by=1e-3))[0].ok
    report, _ = compared(network, sw.convert(network, sw.SWConfig(form="shift")), dtype=torch.bfloat16, bounds=1e-3)
    assert (report.ok, report.reference) == (False, None)


def test_weights_that_were_rounded_are_judged_by_their_rounding(network: nn.Module) -> None:
    original = copy.deepcopy(network).bfloat16()
    merged = sw.merge(sw.convert(original))
    report, output = compared(original, merged)
    assert (report.ok, report.reference, output.function_error) == (True, "float64", None)
    with torch.no_grad():
        next(module for module in merged.modules() if isinstance(module, nn.Conv2d) and module.groups > 1).weight.mul_(
            -1
        )
    report, _ = compared(original, merged)
    assert not report.ok
    assert "the converted model in bfloat16 is" in report.failures[0]
    report, output = compared(network, original)  # float32 beside bfloat16
    assert output.original_error < 1e-5 < output.converted_error
    assert output.function_error is None


class Takes(nn.Module):
    """A network whose code takes some dtypes alone."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.dtypes = dtypes
        self.conv = nn.Conv2d(3, 3, 7, padding=3, groups=3)

    def forward(self, x):
        if x.dtype not in self.dtypes:
            raise RuntimeError(f"{x.dtype} is not for this network")
        return self.conv(x)


def test_float32_where_float64_does_not_work() -> None:
    model = Takes(torch.bfloat16, torch.float32).bfloat16()
    report, output = compared(model, sw.convert(model))
    assert (report.ok, report.reference) == (True, "float32")
    assert output.original_error > 0
    assert "not compared with float64: torch.float64 is not for this network" in str(report)


def test_neither_leaves_the_bound() -> None:
    model = Takes(torch.bfloat16).bfloat16()
    report, output = compared(model, sw.convert(model))
    assert (report.ok, report.reference, output.original_error) == (True, None, None)
    assert "not compared with float32" in str(report)
    assert not compared(model, with_one_wrong_tap(sw.convert(model), by=1.0))[0].ok


def test_the_models_stay_as_they_are(network: nn.Module) -> None:
    original = copy.deepcopy(network).bfloat16().train()
    converted = sw.convert(original)
    state = copy.deepcopy(original.state_dict())
    assert compared(original, converted)[0].ok
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    assert all(p.dtype == torch.bfloat16 for model in (original, converted) for p in model.parameters())
    assert original.training
    assert converted.training


def test_the_report_shows_both_errors_and_the_reason(network: nn.Module) -> None:
    original = copy.deepcopy(network).bfloat16()
    converted = sw.convert(original, sw.SWConfig(form="shift"))
    report, output = compared(original, converted)
    text = str(report)
    for value in (output.original_error, output.converted_error, output.function_error, report.allowed(output)):
        assert f"{value:.2e}" in text
    (reason,) = report.reasons
    assert f"is {output.converted_error:.2e} from float64, within 2 x {output.original_error:.2e} + 0.01 = " in reason
    assert max(map(len, text.splitlines())) <= 100
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["reference"] == "float64"
    assert read["outputs"][0]["original_error"] == output.original_error
    with pytest.raises(sw.check.report.VerificationError, match="in float64, where nothing is rounded to bfloat16"):
        compared(original, with_one_wrong_tap(converted))[0].raise_if_failed()


# ---- images as outputs


class Enlarges(nn.Module):
    def __init__(self, by: float = 0.0) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) + self.by


def test_psnr_of_images_made_of_images() -> None:
    images = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    report, output = compared(Enlarges(), Enlarges(0.01), data=images, input_size=None, bounds=1.0)
    span = (images.max() - images.min()).item()
    assert output.psnr == pytest.approx(20 * math.log10(span / 0.01), abs=1e-3)
    assert f"{output.psnr:.1f} dB" in str(report)
    report, output = compared(Enlarges(), Enlarges(), data=images, input_size=None)
    assert output.psnr == math.inf
    assert "equal" in str(report)
    assert report.to_dict()["outputs"][0]["psnr"] is None


def test_other_outputs_have_no_psnr() -> None:
    maps = nn.Conv2d(3, 5, 1)
    report, output = compared(maps, maps, data=torch.rand(2, 3, 6, 6), input_size=None)
    assert output.psnr is None
    assert "PSNR" not in str(report)
