"""shift_add as an operator of PyTorch: registration, compilation, export, autocast, inference mode."""

from pathlib import Path

import pytest
import torch

from sw_transplant.ops import shift_add, shift_add_backward_reference, shift_add_reference
from tests.ops.shift_add_cases import CASES, assert_same_bits
from tests.sampling import sample

OPERATORS = torch.ops.sw_transplant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_operators_are_registered_as_pytorch_expects(case, dtype) -> None:
    z, placements, grad = case.inputs(dtype)
    strided = torch.stack([z, z], dim=-1)[..., 0]
    for first in (z.requires_grad_(), strided.requires_grad_()):
        torch.library.opcheck(OPERATORS.shift_add.default, (first, placements, case.out_size, case.stride))
    arguments = (grad.requires_grad_(), placements, case.tiles, case.z_size, case.stride)
    torch.library.opcheck(OPERATORS.shift_add_backward.default, arguments)


def test_schemas() -> None:
    forward, backward = OPERATORS.shift_add.default._schema, OPERATORS.shift_add_backward.default._schema
    assert str(forward).endswith("shift_add(Tensor z, Tensor placements, SymInt[2] out_size, int[2] stride) -> Tensor")
    assert str(backward).endswith(
        "(Tensor grad, Tensor placements, SymInt tiles, SymInt[2] z_size, int[2] stride) -> Tensor"
    )


@pytest.mark.parametrize("backend", sample(["aot_eager", "inductor"], ["aot_eager"]))
def test_compiled_with_a_batch_that_changes(backend: str) -> None:
    case = CASES[5]
    _, placements, _ = case.inputs(torch.float32)
    compiles = 0

    def count(graph, _):
        nonlocal compiles
        compiles += 1
        return graph.forward

    def step(z):
        return shift_add(z * 2, placements, case.out_size, case.stride)

    counted = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        z = torch.randn(batch, case.channels, case.tiles, *case.z_size, requires_grad=True)
        out = compiled(z)
        assert_same_bits(out.detach(), shift_add_reference(2 * z.detach(), placements, case.out_size, case.stride))
        grad = torch.randn_like(out)
        out.backward(grad)
        expected = shift_add_backward_reference(grad, placements, case.tiles, case.z_size, case.stride)
        assert_same_bits(z.grad, 2 * expected)
        assert_same_bits(counted(z).detach(), out.detach())
    assert compiles == 1


def test_exported_with_a_free_batch(tmp_path: Path) -> None:
    case = CASES[0]
    z, placements, _ = case.inputs(torch.float32)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("placements", placements)

        def forward(self, z):
            return shift_add(z, self.placements, case.out_size)

    program = torch.export.export(Layer(), (z,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    z = torch.randn(5, *z.shape[1:])
    assert_same_bits(loaded(z), shift_add_reference(z, placements, case.out_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_keeps_the_dtype(dtype: torch.dtype) -> None:
    case = CASES[2]
    z, placements, _ = case.inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = shift_add(z, placements, case.out_size)
        reference = shift_add_reference(z, placements, case.out_size)
    assert out.dtype == dtype
    assert_same_bits(out, reference)


def test_inference_mode() -> None:
    case = CASES[0]
    z, placements, _ = case.inputs(torch.float32)
    with torch.inference_mode():
        out = shift_add(z, placements, case.out_size)
    assert out.is_inference()
    assert_same_bits(out.clone(), shift_add(z, placements, case.out_size))


def test_meta_tensors_give_shapes() -> None:
    z, placements, _ = CASES[0].inputs(torch.float16)
    out = shift_add(z.to("meta"), placements.to("meta"), (5, 7))
    assert out.shape == (2, 2, 3, 5, 7)
    assert out.dtype == torch.float16
