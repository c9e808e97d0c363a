"""Converted models under compilers and exporters: the same numbers, and not a graph more than needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sw_transplant import convert, merge
from sw_transplant.check.verify import bound_for
from sw_transplant.forms.dispatch import FEW_IMAGES
from sw_transplant.models import SLaK
from tests.runtime_models import CHANNELS, FORMS, LAYERS, error, gradients, images, joined, layer, network
from tests.sampling import sample

BOUND = bound_for(torch.float32)
TRAIN = (False, True)


def mode(value: object) -> str | None:
    """The name of a value of TRAIN, for the ids of cases."""
    return {True: "train", False: "eval"}.get(value) if isinstance(value, bool) else None


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were made since the test began."""
    return counters["stats"]["unique_graphs"]


def assert_same(compiled: nn.Module, model: nn.Module, uncompiled: nn.Module, x: Tensor) -> None:
    """Outputs, in train mode also gradients and statistics, of the compiled model against the uncompiled copy."""
    if not model.training:
        with torch.no_grad():
            assert error(compiled(x), uncompiled(x)) <= BOUND
        return
    got, expected = compiled(x), uncompiled(x)
    assert error(got, expected) <= BOUND
    for one, y in ((model, got), (uncompiled, expected)):
        one.zero_grad()
        y.square().sum().backward()
    assert gradients(model).keys() == gradients(uncompiled).keys()
    assert error(joined(gradients(model)), joined(gradients(uncompiled))) <= 10 * BOUND
    statistics, wanted = (
        {name: tensor for name, tensor in one.named_buffers() if "running" in name} for one in (model, uncompiled)
    )
    assert not wanted or error(joined(statistics), joined(wanted)) <= BOUND


def check_batches(model: nn.Module, backend: str, *inputs: Tensor) -> None:
    """Compiles with a dynamic batch and expects one graph for all of them."""
    uncompiled = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 0)
        assert_same(compiled, model, uncompiled, x)
    assert graphs() == 1


# ---- torch.compile --------------------------------------------------------------------------------------------------


DEPTHS = ((1, 1, 1, 1), (2, 2, 6, 2))
BATCHES = (2, 3, 15)  # from 16 on PyTorch's own convolutions get a second graph on a CPU


@pytest.mark.parametrize(
    ("form", "train"),
    sample(product(FORMS, TRAIN), [("auto", True), ("shift", False)]),
    ids=mode,
)
def test_one_graph_serves_every_batch(form: str, train: bool) -> None:
    check_batches(network(form).train(train), "aot_eager", *map(images, BATCHES))


def test_few_and_many_images_are_one_graph() -> None:
    """On a map this small "auto" decides by the batch, but not for a compiler, which would make a graph for either."""
    module = layer("strips")
    check_batches(module, "aot_eager", *(images(batch, CHANNELS, (7, 7)) for batch in (2, FEW_IMAGES, FEW_IMAGES + 1)))
    with torch.no_grad():
        decided = set()
        for batch in (2, FEW_IMAGES + 1):
            module(images(batch, CHANNELS, (7, 7)))
            assert module.decision is not None
            decided.add(module.decision.form)
    assert decided == {"gemm", "assembled"}


def test_one_graph_serves_every_batch_in_generated_code() -> None:
    check_batches(layer("strips", "toeplitz").train(), "inductor", images(2, CHANNELS), images(3, CHANNELS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("train", TRAIN, ids=mode)
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_in_generated_code_in_every_form(form: str, train: bool) -> None:
    check_batches(network(form).train(train), "inductor", *map(images, BATCHES))


@pytest.mark.parametrize("train", sample(TRAIN, [True]), ids=mode)
def test_a_whole_model(train: bool) -> None:
    torch.manual_seed(0)
    model = SLaK(kernel_size=(13, 11, 9, 7, 5), depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=5)
    check_batches(convert(model).train(train), "aot_eager", *(images(batch, 3, (40, 48)) for batch in (2, 3)))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("depths", "train"), product(DEPTHS, TRAIN), ids=mode)
def test_a_model_of_timm(depths: tuple[int, ...], train: bool) -> None:
    timm = pytest.importorskip("timm", reason="needs the timm extra")
    torch.manual_seed(0)
    model = convert(timm.create_model("convnext_atto", depths=depths, ls_init_value=None)).train(train)
    check_batches(model, "aot_eager", *(images(batch, 3, (64, 64)) for batch in (2, 3)))


@pytest.mark.parametrize("form", sample(FORMS, ["auto"]))
def test_another_map_size(form: str) -> None:
    """Square and oblong, odd and even, beyond the limits between the forms: as many graphs as it takes."""
    model = layer("strips", form)
    uncompiled = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((12, 10), (9, 14), (16, 16), (7, 7)):
        assert_same(compiled, model, uncompiled, images(2, CHANNELS, size))


@pytest.mark.parametrize("form", sample(FORMS, ["toeplitz"]))
def test_changes_after_compiling_are_seen(form: str) -> None:
    """Compiled code reads the weights at each call, whatever the uncompiled model has cached by then."""
    model, x = layer("strips", form), images(2, CHANNELS)
    with torch.no_grad():
        model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        before = compiled(x)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.branches[0].bn.running_mean.add_(1)
        after, expected = compiled(x), copy.deepcopy(model)(x)
        assert error(before, expected) > 100 * BOUND
        assert error(after, expected) <= BOUND
        assert error(model(x), expected) <= BOUND
        assert graphs() == 1
        model.form = "shift" if form == "assembled" else "assembled"
        assert error(compiled(x), expected) <= BOUND
        assert graphs() == 2


def test_autocast_inside_and_outside_of_compiled_code() -> None:
    model, x = layer("strips", "toeplitz"), images(2, CHANNELS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for enabled in (True, False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got, expected = compiled(x), model(x)
        assert got.dtype is expected.dtype is (torch.bfloat16 if enabled else torch.float32)
        assert error(got, expected) <= bound_for(got.dtype)


# ---- torch.export, torch.jit.trace, ONNX ----------------------------------------------------------------------------


EXPORTED = [("strips", "auto"), ("square", "shift"), ("paper", "gemm"), ("strips", "toeplitz"), ("square", "assembled")]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_merged_layer_exports_with_any_batch(name: str, strict: bool) -> None:
    assert_exports(merge(layer(name)), strict)


@pytest.mark.parametrize(("name", "form"), sample(product(LAYERS, FORMS), EXPORTED))
def test_a_converted_layer_exports_with_any_batch(name: str, form: str) -> None:
    model = layer(name, form)
    with torch.no_grad():
        model(images(2, CHANNELS))  # a cache that is full must not end up in the program
    program = assert_exports(model, strict=False)
    names = {key for key, _ in model.named_parameters()}
    assert names <= set(program.state_dict)


def assert_exports(model: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images(2, CHANNELS),), dynamic_shapes=(batch,), strict=strict)
    for count in (1, 2, 33):
        x = images(count, CHANNELS)
        with torch.no_grad():
            assert error(program.module()(x), model(x)) <= BOUND
    return program


@pytest.mark.parametrize("name", LAYERS)
def test_a_merged_layer_is_traced_by_jit(name: str) -> None:
    model = merge(layer(name))
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2, CHANNELS))
        for x in (images(5, CHANNELS), images(1, CHANNELS, (15, 20))):
            assert error(traced(x), model(x)) <= BOUND


@pytest.mark.parametrize("name", sample(LAYERS, ["strips"]))
def test_a_merged_layer_exports_to_onnx(name: str, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    model, x, file = merge(layer(name)), images(2, CHANNELS), tmp_path / "model.onnx"
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.onnx.export(model, (x,), file, dynamic_shapes=(batch,), dynamo=True, input_names=["x"])
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 7):
        x = images(count, CHANNELS)
        (got,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            assert error(torch.from_numpy(got), model(x)) <= BOUND
