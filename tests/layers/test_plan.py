"""The plan that eval keeps, and the shortest way through it on a CPU: the same bits, and never for anything else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from sw_transplant import ShiftwiseConv2d, convert
from sw_transplant.cuda.answers import Passing, Remembered
from sw_transplant.layers import plan, planner
from sw_transplant.layers.planner import Kept
from sw_transplant.layers.sw_conv2d import SWConv2d
from sw_transplant.ops.depthwise import Step
from tests.small_models import Parallel, conv, conv_bn


class Strips(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tall = nn.Conv2d(channels, channels, (17, 3), padding=(8, 1), groups=channels)
        self.wide = nn.Conv2d(channels, channels, (3, 17), padding=(1, 8), groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(x) + self.wide(x)


LAYERS = {
    "small": (nn.Conv2d(6, 6, 7, padding=3, groups=6), (1, 6, 12, 12)),
    "no bias, stride": (nn.Conv2d(6, 6, 7, 2, 3, groups=6, bias=False), (2, 6, 12, 11)),
    "large": (nn.Conv2d(6, 6, 7, padding=3, groups=6), (2, 6, 90, 80)),
    "strips": (Strips(6), (2, 6, 30, 40)),
    "asymmetric": (nn.Conv2d(6, 6, 8, padding="same", groups=6), (2, 6, 12, 12)),
    "float64": (nn.Conv2d(6, 6, 7, padding=3, groups=6).double(), (1, 6, 30, 30)),
}


def layer(name: str) -> tuple[ShiftwiseConv2d, Tensor]:
    """In eval mode, with a map that it fits."""
    torch.manual_seed(0)
    original, shape = LAYERS[name]
    return convert(original).eval(), torch.randn(shape, dtype=next(original.parameters()).dtype)


def warm(module: ShiftwiseConv2d, x: Tensor) -> Tensor:
    """The result of the first call; the shortest way is known then."""
    with torch.no_grad():
        first = module(x)
        for _ in range(3):
            module(x)
    return first


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The way of every call that what is kept serves: "shortcut", "short" or "plan"; making a plan is none."""
    ways: list[str] = []
    step, make = Kept.step, planner.shortcut

    def noted(self: Kept, x: Tensor) -> Step | None:
        way = step(self, x)
        ways.append("plan" if way is None else "short")
        return way

    def made(*args: object) -> Callable[[Tensor], Tensor | None] | None:
        served = make(*args)

        def noting(x: Tensor) -> Tensor | None:
            y = served(x)
            ways.extend([] if y is None else ["shortcut"])
            return y

        return None if served is None else noting

    monkeypatch.setattr(Kept, "step", noted)
    monkeypatch.setattr(planner, "shortcut", made)
    return ways


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_bits_in_the_same_format(name: str, layout: torch.memory_format, taken: list[str]) -> None:
    module, x = layer(name)
    x = x.contiguous(memory_format=layout)
    first = warm(module, x)
    taken.clear()
    other = torch.randn_like(x)
    with torch.no_grad():
        got, expected = module(x), copy.deepcopy(module)(other)
        assert taken == ["short" if name == "strips" else "shortcut"]
        assert torch.equal(module(other), expected)
    assert torch.equal(got, first)
    assert got.stride() == first.stride()
    assert torch.allclose(first, LAYERS[name][0](x), atol=1e-4)


def test_other_maps_take_the_long_way(taken: list[str]) -> None:
    module, x = layer("small")
    warm(module, x)
    others = [
        x[:, :, :-1],
        x.contiguous(memory_format=torch.channels_last),
        torch.cat([x, x]),
        x.mT,
        nn.Parameter(x),
        x.clone().requires_grad_(),
        x[0],
    ]
    for other in others:
        taken.clear()
        y = module(other)
        assert taken == []
        assert torch.allclose(y, LAYERS["small"][0](other), atol=1e-5)
        warm(module, x)


def test_other_conditions_take_the_long_way(taken: list[str]) -> None:
    module, x = layer("small")
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    warm(module, x)
    taken.clear()
    assert not module(x).requires_grad
    assert taken == ["shortcut"]
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * x.numel() * 49
    assert "short" not in taken[1:]
    with torch.inference_mode():
        assert module(x).is_inference()
    assert not module(x).is_inference()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    assert module(x).requires_grad


class Marked(Tensor):
    """A map of another class, which its operations keep."""


def test_a_shortcut_is_for_one_size_of_map() -> None:
    """On a small map the kernel is cut to what reaches it."""
    module, (small, large) = convert(nn.Conv2d(6, 6, 13, padding=6, groups=6)).eval(), torch.randn(2, 1, 6, 20, 20)
    expected = copy.deepcopy(module)
    warm(module, small[:, :, :5, :5].contiguous())
    with torch.no_grad():
        torch.testing.assert_close(module(large), expected(large), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "large"])  # with packed weights, and PyTorch's own way
def test_the_shortcut_is_for_plain_calls(name: str, taken: list[str]) -> None:
    module, x = layer(name)
    original = LAYERS[name][0]
    warm(module, x)
    taken.clear()
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    (expected,) = torch.autograd.grad(original(leaf).square().sum(), leaf)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert module(x).requires_grad  # the layer's own parameters want theirs
    assert taken == []
    warm(module, x)
    with pytest.raises(RuntimeError), torch.no_grad():  # as nn.Conv2d
        module(x.double())
    warm(module, x)
    with torch.no_grad():
        assert type(module(x.as_subclass(Marked))) is Marked
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        warm(module, x)
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() == 2 * x.numel() * 49
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
            torch.jit.trace(module, x)
        warm(module, x)
        primal, tangent = torch.func.jvp(module, (x,), (x,))
        bias = module.branches[0].bias[:, None, None]
        torch.testing.assert_close(tangent, primal - bias, rtol=1e-3, atol=1e-4)
        warm(module, x)
        mapped = torch.func.vmap(module)(x[None].expand(3, -1, -1, -1, -1))
        torch.testing.assert_close(mapped[2], original(x), rtol=1e-3, atol=1e-4)


def test_a_compiled_layer_does_not_follow_the_shortcut() -> None:
    """Whether there is one changes from call to call: who compiles would compile again each time."""
    module, x = layer("small")
    torch._dynamo.reset()
    with torch.no_grad():
        graphs: list[object] = []

        def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(module, backend=counting)
        compiled(x)
        for _ in range(3):
            module(x)
        assert module._planner.shortcut is not None
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_layers_that_are_more_than_one_kernel_take_no_shortcut() -> None:
    for module, x in ((SWConv2d(8, 9).eval(), torch.randn(1, 8, 10, 10)), layer("strips")):
        warm(module, x)
        assert module._planner.shortcut is None


STRUCTURE: dict[str, Callable[[ShiftwiseConv2d], object]] = {
    "branch": lambda m: m.branches.append(copy.deepcopy(m.branches[0])),
    "exchanged branch": lambda m: m.branches.__setitem__(0, doubled(m.branches[0])),
    "exchanged branches": lambda m: setattr(m, "branches", nn.ModuleList([doubled(m.branches[0])])),
    "norm": lambda m: setattr(m.branches[0], "bn", nn.BatchNorm2d(6, eps=3.0).eval()),
    "no bias": lambda m: setattr(m.branches[0], "bias", None),
    "bias": lambda m: setattr(m.branches[0], "bias", nn.Parameter(torch.ones(6))),
    "parametrized": lambda m: parametrize.register_parametrization(m.branches[0], "bank", Doubled()),
    "data of the bias": lambda m: setattr(m.branches[0].bias, "data", torch.ones(6)),
    "optimizer": lambda m: fused_step(m),
    "gain": lambda m: setattr(m.branches[0], "gain", nn.Parameter(torch.full((1,), 2.0))),
    "mask": lambda m: setattr(m.branches[0], "mask", torch.zeros(m.branches[0].tile_count, dtype=torch.bool)),
    "stride": lambda m: setattr(m, "stride", (2, 2)),
}


class Doubled(nn.Module):
    def forward(self, bank: Tensor) -> Tensor:
        return 2 * bank


def doubled(branch: nn.Module) -> nn.Module:
    with torch.no_grad():
        twin = copy.deepcopy(branch)
        twin.bank.mul_(2)
    return twin


def fused_step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.1, fused=True).step()


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("change", STRUCTURE)
def test_another_structure_is_seen(change: str, name: str) -> None:
    module, x = layer(name)
    before = warm(module, x)
    assert module._planner.shortcut is not None
    STRUCTURE[change](module)
    with torch.no_grad():
        after = module(x)
        again = copy.deepcopy(module)(x)
    assert after.shape != before.shape or not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, again)


@pytest.mark.parametrize("change", ["weight", "bias", "form", "train", "data", "replaced"])
def test_changes_are_seen(change: str) -> None:
    module, x = layer("small")
    before = warm(module, x)
    bank, branch = module.branches[0].bank, module.branches[0]
    with torch.no_grad():
        if change == "weight":
            bank.mul_(2)
        elif change == "bias":
            branch.bias.add_(1)
        elif change == "form":
            module.form = "shift"
        elif change == "train":
            module.train()
        elif change == "data":
            bank.data = bank.data * 2
        else:
            branch.bank = nn.Parameter(bank * 2)
        after = module(x)
        expected = copy.deepcopy(module)(x)
    assert torch.equal(after, expected)
    assert module.decision is not None
    assert module.decision.form == ("shift" if change == "form" else "assembled")
    if change not in ("form", "train"):
        assert not torch.allclose(after, before, atol=1e-3)


def test_autocast_takes_the_plan(taken: list[str]) -> None:
    module, x = layer("small")
    with torch.autocast("cpu", torch.bfloat16):
        warm(module, x.bfloat16())
        warm(module, x)
    assert set(taken) == {"plan"}
    with pytest.raises(RuntimeError, match="same"), torch.no_grad():
        module(x.bfloat16())


def test_ghosts_go_around_the_plan() -> None:
    module, x = SWConv2d(8, 9, ghost=0.25).eval(), torch.randn(1, 8, 10, 10)
    first = warm(module, x)
    with torch.no_grad():
        assert torch.equal(module(x), first)
        assert torch.equal(module(x)[:, module.ghosts], x[:, module.ghosts])


def test_another_number_of_images_keeps_the_plan() -> None:
    module, x = layer("strips")
    warm(module, x)
    kept = module._planner._kept
    with torch.no_grad():
        for count in (1, 3, 2):
            module(x[:1].expand(count, -1, -1, -1).contiguous())
    assert module._planner._kept is kept


# ---- training steps ----


class WithNorms(Strips):
    def __init__(self) -> None:
        super().__init__(4)
        self.tall_bn, self.wide_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tall_bn(self.tall(x)) + self.wide_bn(self.wide(x))


def training_step(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.fixture
def outlines(monkeypatch) -> list[int]:
    """One entry for each outline that is made."""
    made: list[int] = []
    outline = planner.outline
    monkeypatch.setattr(planner, "outline", lambda *given: made.append(1) or outline(*given))
    return made


@pytest.mark.parametrize("form", ["toeplitz", "assembled", "gemm", "shift"])
@pytest.mark.parametrize("make", [WithNorms, lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4)])
def test_training_steps_share_an_outline_and_nothing_else(form: str, make, outlines: list[int]) -> None:
    torch.manual_seed(0)
    module, x = convert(make()).train(), torch.randn(2, 4, 9, 8)
    module.form = form
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for step in range(3):
        fresh = copy.deepcopy(module)
        outlines.clear()
        got = training_step(module, x)
        assert len(outlines) == (step == 0)
        assert all(map(torch.equal, got, training_step(fresh, x)))
        for parameter, gradient in zip(module.parameters(), got[1:], strict=True):
            parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize(
    "change", ["norm to eval", "frozen bank", "form", "size", "recompute", "bank", "data", "no grad", "stride"]
)
def test_what_an_outline_follows_from_is_seen(change: str, outlines: list[int]) -> None:
    torch.manual_seed(0)
    module, x = convert(WithNorms()).train(), torch.randn(2, 4, 9, 8)
    outlines.clear()  # those of the proof
    training_step(module, x)
    training_step(module, x)
    assert len(outlines) == 1
    branch = module.branches[0]
    grad = change != "no grad"
    if change == "norm to eval":
        branch.bn.eval()
    elif change == "frozen bank":
        branch.bank.requires_grad_(False)
    elif change == "form":
        module.form = "assembled"
    elif change == "size":
        x = x[:, :, :7]
    elif change == "recompute":
        module.recompute = "all"
    elif change == "bank":
        branch.bank = nn.Parameter(branch.bank.detach() * 2)
    elif change == "data":
        branch.bank.data = branch.bank.data * 2
    elif change == "stride":
        module.stride = (2, 2)
    fresh = copy.deepcopy(module)
    with torch.set_grad_enabled(grad):
        results = [training_step(each, x) if grad else [each(x)] for each in (module, fresh)]
    assert len(outlines) == 3
    assert all(map(torch.equal, *results))


def test_what_was_decided_by_a_passing_answer_is_decided_again(monkeypatch, outlines: list[int]) -> None:
    asked = []

    @Remembered
    def why_not(subject: object) -> str:
        asked.append(subject)
        if len(asked) < 3:
            raise Passing("later")
        return ""

    choose = plan.choose_form
    monkeypatch.setattr(plan, "choose_form", lambda *given, **more: (why_not(0) and None) or choose(*given, **more))
    module, x = layer("small")
    with torch.no_grad():
        for _ in range(5):
            module(x)
    assert (len(asked), len(outlines)) == (3, 3)


@pytest.mark.parametrize("norm", [False, True], ids=["as it is", "through a BatchNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_leaves_the_map_that_is_passed_on_as_precise_as_it_is(
    norm: bool, dtype: torch.dtype, training: bool
) -> None:
    """A stream of residuals that was rounded at every sum would be another network."""
    torch.manual_seed(0)
    branches = [conv_bn(size=9), nn.BatchNorm2d(4)] if norm else [conv(size=9), nn.Identity()]
    model = Parallel(*branches).train(training)
    converted = convert(model)
    x = torch.randn(2, 4, 12, 12).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), converted(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    if dtype is torch.float32 and not norm:  # rounding the map itself would be off by 1e-2
        assert (got - expected).abs().max() < 4e-3
