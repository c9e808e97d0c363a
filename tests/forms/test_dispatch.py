"""Which form runs: the rule, what is asked for, what cannot run, and that every layer says it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, set_form, summary, tune
from sw_transplant.forms import FORMS, Call
from sw_transplant.forms.dispatch import FEW_IMAGES, MATRIX_LIMIT, Conditions, Job, choose_form, conditions
from sw_transplant.geometry import Extent
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.surgery import tuning

STRIPS = (Extent((51, 5), (25, 2)), Extent((5, 51), (2, 25)))
SQUARE = (Extent((7, 7), (3, 3)),)


def job(kernels=STRIPS, size=(28, 28), *, dtype=torch.float32, channels=(64, 64), stride=(1, 1), trained=False):
    out_size = tuple(-(-side // step) for side, step in zip(size, stride, strict=True))
    return Job(channels, Call(size, out_size, stride, dtype), [kernels], trained)


def given(device="cpu", *, many=False, channels_last=False, autocast=None, coarse_matmul=False):
    return Conditions(torch.device(device), many, channels_last, autocast, coarse_matmul)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that CUDA devices have the kernels; a value written to the list is the reason why not."""
    reasons = [""]
    monkeypatch.setattr("sw_transplant.forms.dispatch.why_no_kernel", lambda device: reasons[0])
    monkeypatch.setattr("sw_transplant.forms.dispatch.takes_channels_last", lambda *geometry: True)
    return reasons


def test_auto_on_a_gpu(gpu):
    cuda = given("cuda:0")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for trained in (False, True):
            assert choose_form("auto", job(dtype=dtype, trained=trained), cuda).form == "toeplitz"
            assert choose_form("auto", job(size=(14, 14), dtype=dtype, trained=trained), cuda).form == "gemm"
    assert choose_form("auto", job(stride=(2, 2)), cuda).form == "assembled"
    assert choose_form("auto", job(dtype=torch.float64), cuda).form == "assembled"
    assert choose_form("auto", job(size=(14, 14), dtype=torch.float64), cuda).form == "gemm"
    assert choose_form("auto", job(channels=(32, 64)), cuda).form == "assembled"


def test_where_cudnn_is_faster(gpu):
    layout = given("cuda:0", channels_last=True)
    assert choose_form("auto", job(SQUARE, dtype=torch.float16), layout).form == "assembled"
    assert choose_form("auto", job(SQUARE), layout).form == "toeplitz"
    assert choose_form("auto", job(dtype=torch.float16), layout).form == "toeplitz"
    assert choose_form("auto", job(SQUARE, dtype=torch.float16), given("cuda:0")).form == "toeplitz"


def test_a_gpu_without_the_kernel_says_why(gpu):
    gpu[0] = "needs tensor cores"
    for form in ("auto", "toeplitz"):
        assert choose_form(form, job(), given("cuda:0")) == ("assembled", "toeplitz needs tensor cores")
    assert choose_form("auto", job(size=(7, 7)), given("cuda:0")).form == "gemm"


def test_matrix_products_are_not_coarser_than_convolutions_were(gpu):
    coarse = given("cuda:0", coarse_matmul=True)
    assert choose_form("auto", job(size=(14, 14)), coarse).form == "toeplitz"
    assert choose_form("auto", job(size=(14, 14), dtype=torch.float16), coarse).form == "gemm"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_memory_limit_of_matrices(gpu, device):
    fitting = MATRIX_LIMIT // (4 * 14**4)
    assert choose_form("gemm", job(size=(14, 14), channels=(fitting, fitting)), given(device)).form == "gemm"
    decision = choose_form("gemm", job(size=(14, 14), channels=(fitting + 1, fitting + 1)), given(device))
    assert decision.form == "assembled"
    assert "MiB" in decision.reason
    assert (
        choose_form("auto", job(size=(14, 14), channels=(fitting + 1, fitting + 1)), given("cuda:0")).form == "toeplitz"
    )


def test_auto_on_a_cpu():
    cpu = given()
    assert choose_form("auto", job(), cpu).form == "assembled"
    assert choose_form("auto", job(size=(7, 7)), cpu).form == "gemm"
    assert choose_form("auto", job(size=(7, 7)), given(many=True)).form == "assembled"
    assert choose_form("auto", job(SQUARE, size=(7, 7)), cpu).form == "assembled"
    assert choose_form("auto", job(SQUARE, size=(14, 14), dtype=torch.float64), cpu).form == "gemm"
    assert choose_form("auto", job(trained=True), cpu).form == "toeplitz"
    assert choose_form("auto", job(SQUARE, size=(7, 7), trained=True), cpu).form == "assembled"
    assert choose_form("auto", job(trained=True, stride=(2, 2)), cpu).form == "assembled"


def test_other_devices_take_convolutions():
    decision = choose_form("auto", job(size=(7, 7)), given("mps"))
    assert decision == ("assembled", "nothing was measured on mps")


def test_what_is_asked_for_runs_where_it_can():
    for form in FORMS:
        assert choose_form(form, job(size=(8, 8)), given()) == (form, "asked for")
    with pytest.raises(ValueError, match="expected 'auto' or one of"):
        choose_form("fastest", job(), given())
    dilated = (Extent((7, 7), (6, 6), (2, 2)),)
    assert choose_form("toeplitz", job(dilated), given()).form == "assembled"


def test_conditions_of_a_map():
    x = torch.zeros(FEW_IMAGES, 3, 4, 5)
    assert conditions(x) == given()
    assert conditions(torch.zeros(FEW_IMAGES + 1, 3, 4, 5)) == given(many=True)
    assert conditions(x.contiguous(memory_format=torch.channels_last)) == given(channels_last=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert conditions(x) == given(autocast=torch.bfloat16)


def depthwise(channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return convert(nn.Sequential(depthwise(4, 9), nn.ReLU(), depthwise(4, 7, 2))).eval()


def test_a_layer_remembers_what_ran_and_the_summary_shows_it(model):
    assert "not run yet" in summary(model)
    set_form(model, "gemm", select="2")
    model(torch.randn(1, 4, 12, 12))
    assert [layer.decision.form for layer in (model[0], model[2])] == ["assembled", "gemm"]
    text = summary(model)
    assert "fastest convolution here" in text
    assert "asked for" in text
    assert "not run yet" not in text


def test_set_form(model):
    assert set_form(model, "shift") == ["0", "2"]
    assert [model[0].form, model[2].form] == ["shift", "shift"]
    assert set_form(model, "toeplitz", select=lambda path, module: module.stride == (1, 1)) == ["0"]
    assert [model[0].form, model[2].form] == ["toeplitz", "shift"]
    with pytest.raises(ValueError, match="expected 'auto' or one of"):
        set_form(model, "fast")
    with pytest.raises(ValueError, match="names no layer"):
        set_form(model, "auto", select="3")
    with pytest.raises(ValueError, match="no Shiftwise layer"):
        set_form(nn.Conv2d(3, 3, 3), "auto")


@pytest.mark.parametrize("train", [False, True])
def test_tune_measures_every_form_and_sets_the_fastest(model, train):
    original = [parameter.clone() for parameter in model.parameters()]
    model.train(train)
    report = tune(model, torch.randn(2, 4, 12, 12), rounds=2)
    assert [layer.path for layer in report.layers] == ["0", "2"]
    first, last = report.layers
    assert first.milliseconds.keys() == FORMS.keys()
    assert last.milliseconds.keys() == FORMS.keys() - {"toeplitz"}  # which has no stride
    for layer in report.layers:
        assert layer.form in ("auto", *FORMS)
        assert layer.form != layer.default
        assert layer.default in layer.milliseconds
        assert model.get_submodule(layer.path).form == layer.form
        assert layer.path in str(report)
    assert model.training is train
    assert all(torch.equal(a, b) for a, b in zip(original, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tune_leaves_batch_norms_and_other_layers_alone(model):
    block = nn.Sequential(SWConv2d(4, 9), model).train()
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    report = tune(block, torch.randn(2, 4, 10, 10), select="0", rounds=1)
    assert [layer.path for layer in report.layers] == ["0"]
    assert model[0].form == model[2].form == "auto"
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


def test_tune_measures_equal_layers_once(monkeypatch):
    model = convert(nn.Sequential(*(depthwise(4, 7) for _ in range(3)), depthwise(4, 9))).eval()
    measured = []
    measure = tuning._measure
    monkeypatch.setattr(tuning, "_measure", lambda layer, *rest: measured.append(layer) or measure(layer, *rest))
    report = tune(model, torch.randn(1, 4, 8, 8), rounds=1)
    assert measured == [model[0], model[3]]
    assert len({layer.form for layer in report.layers[:3]}) == 1


def test_tune_fails_whole(model):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = model[0], model[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match=r"did not reach \['unused'\]"):
        tune(Half(), torch.randn(1, 4, 8, 8))
    assert model[0].form == "auto"
    with pytest.raises(ValueError, match="no Shiftwise layer"):
        tune(nn.ReLU(), torch.zeros(1))


def test_the_config_takes_every_form():
    for form in ("auto", *FORMS):
        layer = convert(depthwise(4, 7), SWConfig(form=form))
        assert isinstance(layer, ShiftwiseConv2d)
        assert layer.form == form
