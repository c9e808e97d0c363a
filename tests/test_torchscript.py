"""TorchScript: a converted model is refused with the way out, before any layer runs; a merged one goes through."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sw_transplant import merge
from sw_transplant.layers.planner import Planner
from tests.runtime_models import CHANNELS, FORMS, LAYERS, images, layer, network
from tests.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

WAYS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "trace": torch.jit.trace,
    "trace of a function": lambda model, x: torch.jit.trace(lambda given: model(given), x),
    "script": lambda model, x: torch.jit.script(model),
    "TorchScript ONNX": lambda model, x: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The layers that got as far as a plan."""
    layers: list[object] = []
    monkeypatch.setattr(Planner, "__call__", lambda self, layer, x: layers.append(layer))
    return layers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_converted_layer_is_refused_before_it_runs(name: str, way: str, planned: list[object]) -> None:
    if way == "TorchScript ONNX":
        pytest.importorskip("onnxscript", reason="needs the onnx extra")
    with pytest.raises(RuntimeError, match=r"Merge first: sw_transplant\.merge\(model\)"):
        WAYS[way](layer(name).requires_grad_(False), images(2, CHANNELS))
    assert planned == []


@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_form(form: str) -> None:
    model = network(form).requires_grad_(False)
    with torch.no_grad():
        model(images(2))  # a plan that is kept must not be traced either
        for way in ("trace", "script"):
            with pytest.raises(RuntimeError, match=r"torch\.jit\.\w+: .* Merge first"):
                WAYS[way](model, images(2))


@pytest.mark.parametrize("name", LAYERS)
def test_a_merged_layer_is_scripted(name: str) -> None:
    model = merge(layer(name))
    scripted = torch.jit.script(model)
    for x in (images(2, CHANNELS), images(1, CHANNELS, (15, 20))):
        assert torch.equal(scripted(x), model(x))


@pytest.mark.parametrize("name", sample(LAYERS, ["strips"]))
def test_a_converted_layer_exports_to_onnx_by_dynamo(name: str) -> None:
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    program = torch.onnx.export(layer(name), (images(2, CHANNELS),), dynamo=True, verbose=False)
    assert program is not None
    operators = {node.op_type for node in program.model.graph}
    assert "Conv" in operators or "MatMul" in operators
