"""Guarantees: which forms keep to them, that a call raises rather than break one, and where they are declared."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, load, save, set_form
from sw_transplant.forms import FORMS
from sw_transplant.forms.dispatch import choose_form
from tests.forms.test_dispatch import given, gpu, job  # noqa: F401  gpu is a fixture

SIXTEEN = (torch.float16, torch.bfloat16)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def chosen(form: str, guarantee, where="cpu", dtype=torch.float32, size=(28, 28), **conditions) -> str:
    words = (guarantee,) if isinstance(guarantee, str) else guarantee
    return choose_form(form, job(size=size, dtype=dtype), given(where, **conditions), guarantee=words).form


# ---- exact


def test_exact_on_a_cpu() -> None:
    for form in FORMS:
        assert chosen(form, "exact", size=(14, 14)) == form
        for dtype in SIXTEEN:
            assert chosen(form, "exact", dtype=dtype, size=(14, 14)) == ("assembled" if form == "shift" else form)
    decision = choose_form("shift", job(dtype=torch.bfloat16), given(), guarantee=("exact",))
    assert decision.reason == "shift rounds the response of every tile to bfloat16"


def test_exact_and_products_in_fewer_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert chosen("gemm", "exact", size=(7, 7)) == chosen("toeplitz", "exact") == "assembled"
    assert chosen("gemm", (), size=(7, 7)) == "gemm"


def test_exact_on_a_gpu(gpu) -> None:  # noqa: F811
    assert chosen("auto", (), "cuda:0") == "toeplitz"
    assert chosen("auto", "exact", "cuda:0") == "assembled"
    assert chosen("auto", "exact", "cuda:0", torch.bfloat16) == "toeplitz"
    assert chosen("auto", "exact", "cuda:0", size=(14, 14)) == "gemm"
    assert chosen("gemm", "exact", "cuda:0", size=(14, 14), coarse_matmul=True) == "assembled"


def test_exact_where_cublas_adds_in_16_bits(gpu, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("sw_transplant.forms.guarantees._adds_in_16_bits", lambda dtype: True)
    assert chosen("auto", "exact", "cuda:0", torch.bfloat16, size=(14, 14)) == "toeplitz"
    monkeypatch.setattr("sw_transplant.forms.guarantees._adds_in_16_bits", lambda dtype: False)
    assert chosen("auto", "exact", "cuda:0", torch.bfloat16, size=(14, 14)) == "gemm"


def test_exact_forms_are_as_close_as_the_convolution() -> None:
    """What the table promises, measured: allowed forms have the error of nn.Conv2d, the refused one a larger one."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 21, padding=10, groups=16, bias=False)
    x = torch.randn(2, 16, 14, 14).bfloat16()
    small = copy.deepcopy(conv).bfloat16()
    exact = copy.deepcopy(small).double()(x.double())

    def error(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(x).double() - exact).norm() / exact.norm())

    layer, original = convert(small), error(small)
    for form in ("assembled", "gemm", "toeplitz"):
        set_form(layer, form, guarantee="exact")
        assert error(layer) < 1.05 * original
    set_form(layer, "shift", guarantee=())
    assert error(layer) > 1.2 * original
    set_form(layer, "shift", guarantee="exact")
    assert error(layer) < 1.05 * original
    assert layer.decision.form == "assembled"


# ---- deterministic


def test_deterministic_on_a_gpu(gpu, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for form in ("shift", "toeplitz"):
        assert chosen(form, "deterministic", "cuda:0") == form
    assert chosen("auto", "deterministic", "cuda:0", size=(14, 14)) == "toeplitz"
    with pytest.raises(
        NotImplementedError, match=r"gemm is repeatable with CUBLAS.*assembled is repeatable with torch"
    ):
        chosen("gemm", "deterministic", "cuda:0", size=(14, 14))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert chosen("gemm", "deterministic", "cuda:0", size=(14, 14)) == "assembled"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert chosen("gemm", "deterministic", "cuda:0", size=(14, 14)) == "gemm"


def test_pytorchs_own_switch_is_honoured(gpu, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    on = given("cuda:0")._replace(deterministic=True)
    assert choose_form("auto", job(size=(14, 14)), on).form == "toeplitz"
    assert choose_form("gemm", job(size=(14, 14)), on).form == "assembled"  # PyTorch sees to that one


def test_the_switch_is_seen_between_calls(deterministic, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(words, deterministic: bool) -> tuple:
        seen.append(deterministic)
        return ()

    monkeypatch.setattr("sw_transplant.forms.dispatch.promises", note)
    layer, x = convert(nn.Conv2d(4, 4, 7, padding=3, groups=4)).eval(), torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        layer(x)
        torch.use_deterministic_algorithms(False)
        layer(x)
        layer(x)
    assert seen == [True, False]


# ---- no fallback


def test_no_fallback_raises_what_would_have_replaced_the_form() -> None:
    layer = convert(nn.Conv2d(4, 4, 7, stride=2, padding=3, groups=4), SWConfig(form="toeplitz"))
    x = torch.randn(1, 4, 9, 9)
    layer(x)
    assert layer.decision.form == "assembled"
    set_form(layer, "toeplitz", guarantee="no_fallback")
    with pytest.raises(NotImplementedError, match=r"'toeplitz' was asked for without fallback, and toeplitz is"):
        layer(x)
    set_form(layer, "auto")
    layer(x)
    set_form(layer, "shift", guarantee=["no_fallback", "exact"])
    layer(x)
    with pytest.raises(NotImplementedError, match="rounds the response of every tile"):
        layer.bfloat16()(x.bfloat16())


# ---- where it is declared


def network() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(4, 4, 7, padding=3, groups=4) for _ in range(3)))


def test_layers_by_pattern(tmp_path) -> None:
    config = SWConfig(
        guarantee="exact",
        layers={"[12]": {"form": "shift", "guarantee": ["no_fallback", "exact"]}, "2": {"nonfinite": "local"}},
    )
    assert SWConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(SWConfig.from_dict(config.to_dict()))
    model = convert(network(), config)

    def settings(model: nn.Module) -> list[tuple]:
        layers = [module for module in model.modules() if isinstance(module, ShiftwiseConv2d)]
        return [(layer.form, layer.guarantee, layer.nonfinite) for layer in layers]

    assert settings(model) == [
        ("auto", ("exact",), "anywhere"),
        ("shift", ("exact", "no_fallback"), "anywhere"),
        ("shift", ("exact", "no_fallback"), "local"),
    ]
    save(model, tmp_path)
    assert settings(load(network(), tmp_path)) == settings(copy.deepcopy(model)) == settings(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guarantee": "fast"}, r"SWConfig.guarantee: got 'fast', expected some of"),
        ({"guarantee": ["exact", 3]}, r"SWConfig.guarantee: got"),
        ({"guarantee": 3}, r"SWConfig.guarantee: got 3"),
        ({"layers": ["a"]}, r"SWConfig.layers: got \['a'\]"),
        ({"layers": {"a": {}}}, r"SWConfig.layers: got 'a' with {}"),
        ({"layers": {"a": {"tile": 3}}}, r"SWConfig.layers: got 'a' with {'tile': 3}"),
        ({"layers": {"a": {"form": "fast"}}}, r"SWConfig.form: got 'fast'"),
    ],
)
def test_what_is_no_guarantee(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SWConfig(**values)


def test_a_pattern_that_names_nothing() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"SWConfig.layers: 'stages.\*' names no layer that is converted"):
        convert(model, SWConfig(layers={"stages.*": {"form": "shift"}}))
    assert isinstance(model[0], nn.Conv2d)
    with pytest.raises(ValueError, match="guarantee: got 'quick'"):
        set_form(convert(model), "auto", guarantee="quick")
