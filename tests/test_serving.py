"""Converted and merged networks outside of PyTorch's eager mode: ONNX, saved programs, compiled packages, int8."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sw_transplant import merge
from sw_transplant.check.verify import bound_for
from tests.runtime_models import FORMS, images, network
from tests.sampling import sample

BOUND = bound_for(torch.float32)
KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {"converted": lambda model: model, "merged": merge}
SIZES = (1, 2, 7)
"""Of batches; programs are made with two images."""
BATCH = {0: torch.export.Dim("batch", min=1, max=64)}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def model(kind: str, form: str = "auto") -> nn.Module:
    return KINDS[kind](network(form))


def export(kind: str, form: str = "auto") -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model(kind, form), (images(2),), dynamic_shapes=(BATCH,))


def check(serve: Callable[[Tensor], Tensor]) -> None:
    expected = network("assembled")
    with torch.no_grad():
        for count in SIZES:
            y, got = expected(images(count)), serve(images(count))
            assert (got - y).norm() <= BOUND * y.norm(), count


def own_operators(program: torch.export.ExportedProgram) -> Counter[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if name.startswith("sw_transplant."))


ONNX = [("merged", "auto"), *(("converted", form) for form in FORMS)]


@pytest.mark.parametrize(("kind", "form"), sample(ONNX, [("converted", "shift")]))
def test_onnx(kind: str, form: str, tmp_path: Path) -> None:
    """Of PyTorch's operators alone, whatever the form: ONNX has none of ours."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model(kind, form), (images(2),), file, dynamic_shapes=(BATCH,), dynamo=True, input_names=["x"]
        )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    check(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))
    if kind == "converted":
        assert not torch.onnx.is_in_onnx_export()
        program = export(kind, form)
        assert bool(own_operators(program)) is (form in ("shift", "toeplitz")), "afterwards it has its own form again"


@pytest.mark.parametrize(("kind", "form"), sample(ONNX, [("merged", "auto")]))
def test_saved_programs(kind: str, form: str, tmp_path: Path) -> None:
    torch.export.save(export(kind, form), tmp_path / "model.pt2")
    check(torch.export.load(tmp_path / "model.pt2").module())


PACKAGES = [(kind, frozen) for kind in KINDS for frozen in (False, True)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "frozen"), PACKAGES)
def test_compiled_packages(kind: str, frozen: bool, tmp_path: Path) -> None:
    with torch._inductor.config.patch(freezing=frozen):
        package = torch._inductor.aoti_compile_and_package(export(kind), package_path=str(tmp_path / "model.pt2"))
    check(torch._inductor.aoti_load_package(package))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_weights(kind: str) -> None:
    """What torchao quantizes are the linear layers; converted layers and all others keep their weights."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    plain, quantized = [nn.Sequential(model(kind)[:-1], nn.Linear(6, 64), nn.Linear(64, 5)) for _ in range(2)]
    quantized.load_state_dict(plain.state_dict())
    torchao.quantize_(quantized, torchao.Int8WeightOnlyConfig())
    of_linear = {"1.weight", "2.weight"}
    for name, parameter in quantized.named_parameters():
        if name in of_linear:
            assert not torch.equal(parameter.dequantize(), plain.get_parameter(name))
        else:
            assert torch.equal(parameter, plain.get_parameter(name)), name
    expected = copy.deepcopy(plain)
    with torch.no_grad():
        for name in of_linear:
            expected.get_parameter(name).copy_(quantized.get_parameter(name).dequantize())
        for count in SIZES:
            y, got = expected(images(count)), quantized(images(count))
            assert (got - y).norm() <= BOUND * y.norm()
        exported, y = torch.export.export(quantized, (images(2),)).module(), quantized(images(2))
        assert (exported(images(2)) - y).norm() <= BOUND * y.norm()
