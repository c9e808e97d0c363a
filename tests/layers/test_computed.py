"""`layer.weight` computes as a tensor does, refuses every write, and hands on what belongs to the parameter."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from sw_transplant import ShiftwiseConv2d, convert
from sw_transplant.layers.computed import ComputedTensor
from tests.runtime_models import images, layer

SHAPE = (4, 1, 7, 7)


@pytest.fixture
def plain() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 4, 7, padding=3, groups=4)


@pytest.fixture
def converted(plain: nn.Conv2d) -> ShiftwiseConv2d:
    module = convert(plain)
    assert isinstance(module, ShiftwiseConv2d)
    return module


# ---- writes ---------------------------------------------------------------------------------------------------------


def element(w: Tensor) -> None:
    w[0, 0, 0, 0] = 3.0


def assign_data(w: Tensor) -> None:
    w.data = torch.zeros(SHAPE)


def rows(w: Tensor) -> None:
    for row in w:
        row.zero_()


def added(w: Tensor) -> None:
    w += 1


def clipped(w: Tensor) -> None:
    w.grad = torch.ones(SHAPE)
    nn.utils.clip_grad_norm_([w], 1e-3)


WRITES: dict[str, Callable[[Tensor], object]] = {
    **{
        f"init.{name}": getattr(nn.init, name)
        for name in (
            "zeros_",
            "ones_",
            "normal_",
            "uniform_",
            "trunc_normal_",
            "xavier_normal_",
            "orthogonal_",
            "dirac_",
        )
    },
    "init.kaiming_normal_, by keywords": lambda w: nn.init.kaiming_normal_(tensor=w, mode="fan_out"),
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros(SHAPE)),
    "data.clamp_": lambda w: w.data.clamp_(-0.1, 0.1),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "assigned data": assign_data,
    "renorm_": lambda w: w.data.renorm_(2, 0, 0.5),
    "an element": element,
    "a row": lambda w: w[0].fill_(1),
    "every row": rows,
    "flat": lambda w: w.view(-1).zero_(),
    "reshaped": lambda w: w.reshape(-1).zero_(),
    "squeezed": lambda w: w.squeeze(1).zero_(),
    "transposed": lambda w: w.mT.zero_(),
    "a chunk": lambda w: w.chunk(2)[0].zero_(),
    "a view of a view": lambda w: w.data.view(4, 49)[:, 3:].t().zero_(),
    "cast to what it is": lambda w: w.float().contiguous().to(torch.float32).zero_(),
    "out=": lambda w: torch.mul(torch.ones(SHAPE), 2, out=w.data),
    "out= of a random function": lambda w: torch.randn(SHAPE, out=w.data),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "relu in place": lambda w: F.relu(w, inplace=True),
    "index_put_": lambda w: w.index_put_((torch.tensor([0]),), torch.zeros(1)),
    "+=": added,
    "detach_": lambda w: w.detach_(),
    "share_memory_": lambda w: w.share_memory_(),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(4 * 49), [w]),
    "gradients clipped": clipped,
    "gradient written to": lambda w: (setattr(w, "grad", torch.ones(SHAPE)), w.grad.zero_()),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_raises_and_changes_nothing(
    converted: ShiftwiseConv2d, plain: nn.Conv2d, write: str, mode: Callable[[], object]
) -> None:
    with mode(), pytest.raises(RuntimeError, match=r"ShiftwiseConv2d\.weight: .*layer\.set_weight\(tensor\)"):
        WRITES[write](converted.weight)
    assert torch.equal(converted.weight, plain.weight)


def test_an_operator_that_nobody_knows_of_is_caught_by_what_it_did(converted: ShiftwiseConv2d) -> None:
    @torch.library.custom_op("sw_tests::halve", mutates_args={"x"})
    def halve(x: Tensor) -> None:
        x.mul_(0.5)

    with pytest.raises(RuntimeError, match=r"layer\.set_weight"), torch.no_grad():
        halve(converted.weight)


def test_arrays_cannot_be_written_to(converted: ShiftwiseConv2d) -> None:
    for array in (converted.weight.detach().numpy(), np.asarray(converted.weight.data)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    np.array(converted.weight.detach())[0] = 0  # a copy


REPLACING: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), r"weight_orig.*'bank'.*layer\.set_weight\(tensor\)"),
    "weight_norm": (lambda m: nn.utils.weight_norm(m), r"weight_g.*layer\.branches\[0\], 'bank'.*merge\(model\)"),
    "weight_norm of the bias": (lambda m: nn.utils.weight_norm(m, "bias"), r"bias_g.*'bank'.*merge\(model\)"),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m), r"parameter `weight` is None"),  # PyTorch's own words
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        r"parametrize.*'bank'",
    ),
    "parametrized bias": (
        lambda m: parametrize.register_parametrization(m, "bias", nn.Identity()),
        r"'bias' is to be taken away or parametrized.*'bank'.*merge\(model\)",
    ),
    "parametrizations.weight_norm": (lambda m: parametrizations.weight_norm(m), r"'weight' is to be .*'bank'"),
    "parametrizations.spectral_norm": (lambda m: parametrizations.spectral_norm(m), r"nor parametrized.*'bank'"),
    "parametrizations.orthogonal": (lambda m: parametrizations.orthogonal(m), r"nor parametrized.*'bank'"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("what", REPLACING)
def test_what_replaces_a_weight_says_what_to_do(converted: ShiftwiseConv2d, what: str, trained: bool) -> None:
    replace, message = REPLACING[what]
    converted.requires_grad_(trained)
    x = images(1, 4)
    expected, names = converted(x), list(converted.state_dict())
    for _ in range(2):  # the first try leaves the layer as it was
        with pytest.raises((RuntimeError, ValueError), match=message):
            replace(converted)
    assert type(converted) is ShiftwiseConv2d
    assert not converted._forward_pre_hooks
    assert list(converted.state_dict()) == names
    assert [name for name, _ in converted.named_parameters()] == ["branches.0.bank", "branches.0.bias"]
    assert torch.equal(converted(x), expected)


def test_a_norm_of_the_bank(converted: ShiftwiseConv2d) -> None:
    expected = converted.weight.detach().clone()
    parametrizations.weight_norm(converted.branches[0], "bank")
    with torch.no_grad():
        converted.branches[0].parametrizations.bank.original0.mul_(2)
    torch.testing.assert_close(converted.weight.detach(), 2 * expected)


@pytest.mark.parametrize("name", ["strips", "paper"])
def test_layers_that_are_no_single_kernel_say_why(name: str) -> None:
    module = layer(name)
    state = copy.deepcopy(module.state_dict())
    for write in (nn.init.zeros_, lambda t: t.data.mul_(2)):
        for tensor in (module.weight, module.bias):
            with pytest.raises(RuntimeError, match=r"does not serve here, as the layer is the sum of [34] branches"):
                write(tensor)
    for ask in (
        lambda w: w.requires_grad_(False),
        lambda w: w.register_hook(lambda grad: grad),
        lambda w: setattr(w, "grad", torch.zeros_like(w)),
    ):
        with pytest.raises(RuntimeError, match=r"belongs to the parameters that it is computed from"):
            ask(module.weight)
    assert module.weight.grad is None
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


# ---- reading --------------------------------------------------------------------------------------------------------


def test_it_computes_as_the_weight_does(converted: ShiftwiseConv2d, plain: nn.Conv2d) -> None:
    w, x = converted.weight, images(2, 4)
    assert isinstance(w, nn.Parameter)
    assert (w.shape, w.dtype, w.device, len(w)) == (SHAPE, torch.float32, torch.device("cpu"), 4)
    assert torch.equal(w, plain.weight)
    assert torch.equal(w.data.norm(), plain.weight.data.norm())
    torch.testing.assert_close(w, plain.weight)
    torch.testing.assert_close(plain.weight, w)
    for result in (
        w + 1,
        1 - w,
        w.abs(),
        w.clone(),
        w.sum(),
        torch.cat([w, w]),
        w.double(),
        w == 0,
        w.detach().cumsum(0),
    ):
        assert type(result) is Tensor
    assert torch.equal(F.conv2d(x, w, converted.bias, padding=3, groups=4), plain(x))


def test_gradients_flow_to_the_bank(converted: ShiftwiseConv2d, plain: nn.Conv2d) -> None:
    for module in (plain, converted):
        x = images(2, 4)
        penalty = module.weight.square().sum() + module.weight[1:].abs().sum()
        (F.conv2d(x, module.weight, module.bias, padding=3, groups=4).square().mean() + penalty).backward()
    torch.testing.assert_close(converted.weight.grad, plain.weight.grad)
    w = converted.weight
    (grad,) = torch.autograd.grad(w.pow(3).sum(), w)
    torch.testing.assert_close(grad, 3 * plain.weight.detach().square())


def test_copies_are_tensors_of_their_own(converted: ShiftwiseConv2d, plain: nn.Conv2d, tmp_path: Path) -> None:
    w = converted.weight
    file = io.BytesIO()
    torch.save({"weight": w, "detached": w.detach()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    copies = (
        copy.deepcopy(w),
        copy.copy(w),
        pickle.loads(pickle.dumps(w)),
        loaded["weight"],
        nn.Parameter(converted.weight),
    )
    for one in copies:
        assert type(one) is nn.Parameter
        assert one.requires_grad
        assert one.is_leaf
    detached = (copy.deepcopy(w.detach()), loaded["detached"], nn.Parameter(converted.weight.data, requires_grad=False))
    save_file({"weight": w.detach()}, tmp_path / "weight.safetensors")
    with torch.no_grad():
        for one in (*copies, *detached, load_file(tmp_path / "weight.safetensors")["weight"]):
            assert not isinstance(one, ComputedTensor)
            assert torch.equal(one, plain.weight)
            one.zero_()
    assert torch.equal(converted.weight, plain.weight)


def test_it_goes_into_other_layers(converted: ShiftwiseConv2d, plain: nn.Conv2d) -> None:
    other = nn.Conv2d(4, 4, 7, padding=3, groups=4)
    other.load_state_dict({"weight": converted.weight, "bias": converted.bias})
    assert torch.equal(other.weight, plain.weight)
    with torch.no_grad():
        other.weight.zero_()
        other.weight.copy_(converted.weight)
        torch._foreach_copy_([other.weight], [converted.weight])
    assert torch.equal(other.weight, plain.weight)
    other.weight = nn.Parameter(converted.weight)
    torch.optim.SGD(other.parameters(), 0.1)
    with pytest.raises(ValueError, match="non-leaf"):  # two layers cannot share it
        other.weight = converted.weight
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([converted.weight], 0.1)


def test_it_is_a_plain_tensor_where_somebody_looks_on(plain: nn.Conv2d) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convert(plain)

        def forward(self, x: Tensor) -> Tensor:
            assert not (watched and isinstance(self.conv.weight, ComputedTensor))
            return F.conv2d(x, self.conv.weight, self.conv.bias, padding=3, groups=4) + self.conv.weight.mean()

    model, x = Reads(), images(2, 4)
    watched = False
    expected = model(x)
    watched = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    exported = [torch.export.export(model, (x,), strict=strict).module()(x) for strict in (False, True)]
    called = torch.func.vmap(lambda one: model(one[None])[0])(x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 0
    for got in (compiled, *exported, called):
        torch.testing.assert_close(got, expected)


def test_it_can_be_given_to_torch_func(converted: ShiftwiseConv2d, plain: nn.Conv2d) -> None:
    w = converted.weight
    assert torch.equal(torch.func.vmap(lambda row: 2 * row)(w), 2 * plain.weight)
    assert torch.equal(torch.func.grad(lambda t: t.square().sum())(w), 2 * plain.weight)


# ---- what belongs to the parameter ----------------------------------------------------------------------------------


def test_requires_grad_is_that_of_the_bank(converted: ShiftwiseConv2d) -> None:
    branch = converted.branches[0]
    with torch.no_grad():
        assert converted.weight.requires_grad
    assert converted.weight.requires_grad_(False) is not None
    assert not branch.bank.requires_grad
    assert not converted.weight.requires_grad
    assert converted.bias.requires_grad
    converted.weight.requires_grad = True
    assert branch.bank.requires_grad
    leaf = converted.weight.detach().requires_grad_()  # of its own, as that of an nn.Conv2d
    leaf.square().sum().backward()
    assert leaf.grad is not None
    assert branch.bank.grad is None


def test_its_gradient_is_that_of_the_bank(converted: ShiftwiseConv2d) -> None:
    bank = converted.branches[0].bank
    assert converted.weight.grad is None
    converted.weight.sum().backward()
    assert torch.equal(converted.weight.grad, torch.ones(SHAPE))
    converted.weight.grad = None
    assert bank.grad is None
    converted.weight.grad = torch.full(SHAPE, 2.0)
    assert bank.grad.shape == bank.shape
    assert bank.grad.sum() == 2 * 4 * 49


def test_its_hooks_are_those_of_the_bank(converted: ShiftwiseConv2d) -> None:
    seen = []

    def halve(grad: Tensor) -> Tensor:
        seen.append(grad.shape)
        return grad / 2

    handle = converted.weight.register_hook(halve)
    converted.weight.sum().backward()
    assert seen == [SHAPE]
    assert torch.equal(converted.weight.grad, torch.full(SHAPE, 0.5))
    handle.remove()
    converted.weight.sum().backward()
    assert torch.equal(converted.weight.grad, torch.full(SHAPE, 1.5))
    with pytest.raises(RuntimeError, match=r"would never run: .*layer\.parameters\(\)"):
        converted.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def test_its_attributes_are_those_of_the_bank(converted: ShiftwiseConv2d) -> None:
    converted.weight.rate = 0.1
    assert converted.branches[0].bank.rate == 0.1
    assert converted.weight.rate == 0.1
    assert not hasattr(converted.weight, "decay")


def test_the_bias_of_one_kernel_is_the_parameter_itself(converted: ShiftwiseConv2d) -> None:
    assert converted.bias is converted.branches[0].bias
    x = images(1, 4)
    before = converted.eval()(x)
    nn.init.constant_(converted.bias, 5.0)
    assert not torch.allclose(converted(x), before)
    assert type(layer("square").bias) is nn.Parameter
