"""channels_last maps through a network: nothing is copied, neither by the operators nor between them."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Node

from sw_transplant import convert, set_form
from sw_transplant.forms import dispatch
from sw_transplant.forms.dispatch import Conditions, Job, choose_form
from sw_transplant.geometry import Extent
from sw_transplant.models import SLaK
from sw_transplant.ops import toeplitz_formats
from tests.sampling import sample

COPIES = {
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.copy.default,
    torch.ops.aten._to_copy.default,
}


def graphs_of(call: Callable[[Callable], None]) -> list[GraphModule]:
    """The graphs that a compiler is given: call(backend) compiles and runs something."""
    graphs: list[GraphModule] = []

    def collect(graph: GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    call(aot_autograd(fw_compiler=collect, bw_compiler=collect))
    return graphs


def is_map(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] * value.shape[3] > 1


def copied(graphs: list[GraphModule]) -> list[Node]:
    """Copies of maps, whole or as another view of them."""
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.target in COPIES]
    return [node for node in nodes if node.meta["val"].numel() > 4000]


def toeplitz_maps(graphs: list[GraphModule]) -> list[torch.Tensor]:
    """What goes into the operators and comes out of them."""
    maps = []
    for graph in graphs:
        for node in graph.graph.nodes:
            if "toeplitz" in str(node.target):
                given = [argument.meta["val"] for argument in node.all_input_nodes]
                maps += [value for value in [*given, node.meta["val"]] if is_map(value) and value.shape[0] == 2]
    return maps


@pytest.mark.parametrize("training", sample([False, True], [True]))
def test_no_copies_in_slak(training: bool) -> None:
    """SLaK-T's kernels and maps, with one block a stage and few channels."""
    torch.manual_seed(0)
    model = SLaK(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), kernel_size=(51, 49, 47, 13, 5)).train(training)
    model = convert(model.to(memory_format=torch.channels_last))
    set_form(model, "toeplitz")
    x = torch.randn(2, 3, 112, 112).contiguous(memory_format=torch.channels_last)

    def call(backend: Callable) -> None:
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
        if training:
            out.sum().backward()

    with torch.set_grad_enabled(training):
        graphs = graphs_of(call)
    maps = toeplitz_maps(graphs)
    assert len(maps) >= (20 if training else 8)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in maps)
    assert copied(graphs) == []


def test_a_decision_says_where_copies_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_no_kernel", lambda device: "")
    monkeypatch.setattr(dispatch, "takes_channels_last", lambda *geometry: geometry[3] == (56, 56))
    extent = Extent((51, 5), (25, 2))

    def decide(size: int, form: str = "auto", channels_last: bool = True) -> str:
        call = dispatch.Call((size, size), (size, size), (1, 1), torch.float32)
        job = Job((8, 8), call, [[extent]], trained=False)
        given = Conditions(torch.device("cuda:0"), True, channels_last, None, False)
        return choose_form(form, job, given).reason

    copies = ", on contiguous copies of channels_last maps"
    assert decide(56) == "tensor cores"
    assert decide(200) == "tensor cores" + copies
    assert decide(200, channels_last=False) == "tensor cores"
    assert decide(200, "toeplitz") == "asked for" + copies
    assert decide(7) == "small map" + copies


def test_which_geometries_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")
    from sw_transplant.cuda.toeplitz import launcher
    from tests.cuda.toeplitz_cases import DEVICES

    monkeypatch.setattr(launcher, "device_of", lambda index: DEVICES[9, 0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(toeplitz_formats.launch, "is_available", lambda device: True)
    monkeypatch.setattr(toeplitz_formats, "is_left_out", lambda *kernel: False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for gradient in (False, True):
            for side, channels, sizes in ((56, 124, (51, 5, 5, 51)), (28, 249, (49, 5, 5, 49)), (56, 96, (7, 7))):
                origins = tuple(size // 2 for size in sizes)
                arguments = (dtype, 0, channels, (side, side), sizes, origins, gradient)
                assert toeplitz_formats.takes_channels_last(*arguments)
    # A halo of 50 on every side of a tile: there is room for one channel, but not for several.
    wide = (torch.float32, 0, 96, (200, 336), (101, 101), (50, 50))
    assert not toeplitz_formats.takes_channels_last(*wide)
    assert not toeplitz_formats.takes_channels_last(*wide, gradient=True)
