"""Frozen layers: no work on weights in compiled calls, nothing else changed, and no training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import sw_transplant as sw
from sw_transplant.cuda.answers import Passing, Remembered
from sw_transplant.forms.dispatch import Decision, choose_form
from sw_transplant.layers import plan as plans
from sw_transplant.layers.sw_conv2d import SWConv2d
from tests.sampling import sample

FORMS = ("assembled", "gemm", "toeplitz", "shift")
WORK = {"where", "flatten", "pad", "stack", "cat", "unfold", "flip", "gather", "index", "index_select", "rsqrt", "mul"}


class Sum(nn.Module):
    """Strips with BatchNorm, which becomes one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Conv2d(4, 4, (11, 3), padding=(5, 1), groups=4)
        self.wide = nn.Conv2d(4, 4, (3, 11), padding=(1, 5), groups=4)
        self.tall_bn, self.wide_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall_bn(self.tall(x)) + self.wide_bn(self.wide(x))


class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Sum(), nn.ReLU(), nn.Conv2d(4, 4, 7, padding=3, groups=4))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return sw.convert(model).eval()


def frozen_layers(model: nn.Module) -> list[sw.ShiftwiseConv2d]:
    return [module for module in model.modules() if isinstance(module, sw.ShiftwiseConv2d) and module.frozen]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 18, 15, generator=torch.Generator().manual_seed(1))


class Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.operations: set[str] = set()
        self.inputs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self.operations.add(str(getattr(node.target, "__name__", node.target)))
            self.inputs += node.op == "placeholder"
        return graph


@torch.no_grad()
@pytest.mark.parametrize("form", sample(FORMS, FORMS[:2]))
def test_a_compiled_call_does_no_work_on_weights(form: str, x: Tensor) -> None:
    model = network()
    sw.set_form(model, form)
    expected = model(x)
    for froze in (False, True):
        torch.compiler.reset()
        graphs = Graphs()
        if froze:
            assert sw.freeze(model, x) is model
        got = torch.compile(model, backend=graphs, fullgraph=True)(x)
        assert torch.allclose(got, expected, atol=1e-5)
        assert bool(graphs.operations & WORK) == (not froze), graphs.operations
    other = torch.randn(3, 4, 18, 15)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert torch.allclose(compiled(other), model(other), atol=1e-5)


@torch.no_grad()
def test_eager_calls_give_the_same_bits_and_the_same_form(x: Tensor) -> None:
    model = network()
    before = model(x)
    decisions = [layer.decision for layer in model.modules() if isinstance(layer, sw.ShiftwiseConv2d)]
    sw.freeze(model, x)
    for _ in range(3):
        assert torch.equal(model(x), before)
    assert [layer.decision for layer in frozen_layers(model)] == decisions
    small = x[:, :, :9]
    assert torch.allclose(model(small), copy.deepcopy(sw.unfreeze(model))(small), atol=1e-6)


@torch.no_grad()
def test_saved_copied_merged_and_undone_as_if_nothing_had_been_frozen(x: Tensor, tmp_path) -> None:
    model = network()
    before, state, text = model(x), model.state_dict(), repr(model)
    held = [name for name, _ in model.named_buffers()]
    sw.freeze(model, x)
    assert "frozen_" in " ".join(name for name, _ in model.named_buffers())
    assert list(model.state_dict()) == list(state)
    assert "frozen" in sw.summary(model)
    assert "frozen" in repr(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copied, pickled, torch.load(file, weights_only=False)):
        assert len(frozen_layers(twin)) == 2
        assert [name for name, _ in twin.named_buffers()] == held
        assert torch.equal(twin(x), before)
    sw.save(model, tmp_path)
    assert torch.equal(sw.load(Network(), tmp_path).eval()(x), before)
    for plain in (sw.merge(model), sw.restore(model)):
        assert torch.allclose(plain.eval()(x), before, atol=1e-5)
        assert "frozen" not in " ".join(name for name, _ in plain.named_buffers())
    assert sw.unfreeze(model) is model
    assert (repr(model), [name for name, _ in model.named_buffers()]) == (text, held)
    assert torch.equal(model.train().eval()(x), before)


def test_no_training(x: Tensor) -> None:
    model = network()
    sw.freeze(model, x)
    with pytest.raises(RuntimeError, match=r"frozen, for inference only; sw_transplant\.unfreeze"):
        model.train()
    model.eval()
    with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad.*unfreeze"):
        model(x)
    model.requires_grad_(False)
    wanted = x.requires_grad_()
    model(wanted).sum().backward()  # that of the map is there
    plain = sw.unfreeze(copy.deepcopy(model))
    again = x.detach().requires_grad_()
    plain(again).sum().backward()
    assert torch.allclose(wanted.grad, again.grad, atol=1e-6)
    sw.unfreeze(model).train()
    with pytest.raises(ValueError, match=r"in train mode.*model\.eval\(\)"):
        sw.freeze(model)
    with pytest.raises(ValueError, match="no Shiftwise module"):
        sw.freeze(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no Shiftwise module"):
        sw.unfreeze(nn.Linear(1, 1))


@torch.no_grad()
@pytest.mark.parametrize("change", ["load", "to", "form", "weight", "in place"])
def test_changes_are_taken_up(change: str, x: Tensor) -> None:
    model = network()
    before = sw.freeze(model, x)(x)
    other = network()
    for parameter in other.parameters():
        parameter.mul_(1.5)
    if change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "to":
        model, x = model.double(), x.double()
    elif change == "form":
        sw.set_form(model, "shift")
    elif change == "weight":
        model[2].set_weight(model[2].weight * 2)
    else:
        model[2].branches[0].bank.mul_(2)
    after = model(x)
    assert frozen_layers(model)
    assert torch.equal(after, copy.deepcopy(model)(x))
    assert torch.allclose(after.float(), before, atol=1e-4) == (change in ("to", "form"))


@torch.no_grad()
def test_the_paper_s_module() -> None:
    module, x = SWConv2d(8, 9, ghost=0.25).eval(), torch.randn(1, 8, 10, 10)
    expected = module(x)
    sw.freeze(module, x)
    assert torch.equal(module(x), expected)
    graphs = Graphs()
    torch.compiler.reset()
    assert torch.allclose(torch.compile(module, backend=graphs, fullgraph=True)(x), expected, atol=1e-5)
    assert not graphs.operations & (WORK - {"index_select", "cat"}), graphs.operations
    assert "frozen" in repr(module)
    sw.unfreeze(module)
    assert torch.equal(module(x), expected)


@torch.no_grad()
def test_what_was_decided_for_want_of_memory_is_not_kept(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, short = network()[2], [True]

    @Remembered
    def why_not(_: object) -> str:
        if short[0]:
            raise Passing("has no memory left")
        return ""

    def choose(requested: str, *arguments: object, **options: object) -> Decision:
        return Decision("assembled", why_not(0)) if why_not(0) else choose_form("gemm", *arguments, **options)

    monkeypatch.setattr(plans, "choose_form", choose)
    before = sw.freeze(layer, x[:, :, :12, :12])(x[:, :, :12, :12])
    assert layer.decision == Decision("assembled", "has no memory left")
    assert not len(layer._frozen)
    assert not [name for name, _ in layer.named_buffers() if name.startswith("frozen_")]
    short[0] = False
    for _ in range(2):
        assert torch.allclose(layer(x[:, :, :12, :12]), before, atol=1e-6)
        assert layer.decision == Decision("gemm", "asked for")
        assert len(layer._frozen) == 1
