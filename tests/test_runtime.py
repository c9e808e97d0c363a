"""Converted models in whatever PyTorch runs them with: autocast, inference mode, torch.func, processes, threads."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from sw_transplant import ShiftwiseConv2d, SWConfig, convert
from sw_transplant.check.verify import BOUNDS
from sw_transplant.forms import FORMS as EXECUTION_FORMS
from sw_transplant.forms.dispatch import FEW_IMAGES
from sw_transplant.layers.planner import Planner
from tests.runtime_models import (
    CHANNELS,
    FORMS,
    LAYERS,
    Strips,
    error,
    gradients,
    images,
    joined,
    layer,
    network,
    original,
)
from tests.sampling import sample

BOUND = BOUNDS[torch.float32]
EXACT = BOUNDS[torch.float64]
every_form = pytest.mark.parametrize("form", FORMS)
every_layer = pytest.mark.parametrize("name", LAYERS)


def maps(batch: int = 2, size: tuple[int, int] = (12, 10)) -> Tensor:
    return images(batch, CHANNELS, size)


def reference(name: str) -> nn.Module:
    """The plain module in float64."""
    return original(name).double()


# ---- autocast -------------------------------------------------------------------------------------------------------


@every_form
@every_layer
def test_autocast_in_eval(name: str, form: str) -> None:
    """In turns with and without: what is cached for the one must not serve the other."""
    module, plain, x = layer(name, form), original(name), maps()
    with torch.no_grad():
        expected = reference(name)(x.double())
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                got = module(x)
                # The paper's module adds its input in float32; merged, that is a part of a kernel.
                assert got.dtype is (torch.float32 if name == "paper" else plain(x).dtype)
                assert error(got, expected) <= BOUNDS[torch.bfloat16 if enabled else torch.float32]
                with torch.autocast("cpu", enabled=False):
                    inner = module(x)
                assert inner.dtype is torch.float32
                assert error(inner, expected) <= BOUND


@every_form
@every_layer
def test_autocast_in_train(name: str, form: str) -> None:
    """A bfloat16 map, from the layer before, into a float32 layer; gradients arrive in the parameters' dtype."""
    module = layer(name, form).train()
    double = layer(name, "assembled", torch.float64).train()
    x = maps(4).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype is torch.bfloat16
    expected = double(wide)
    assert error(y, expected) <= BOUNDS[torch.bfloat16]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert error(x.grad, wide.grad) <= 10 * BOUNDS[torch.bfloat16]
    assert {gradient.dtype for gradient in gradients(module).values()} == {torch.float32}
    assert error(joined(gradients(module)), joined(gradients(double))) <= 10 * BOUNDS[torch.bfloat16]


@every_form
@every_layer
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_autocast_leaves_float64_alone(name: str, form: str, train: bool) -> None:
    module, x = layer(name, form, torch.float64).train(train), maps().double()
    expected = copy.deepcopy(module)(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype is torch.float64
    assert error(got, expected) <= EXACT


# ---- the cache of eval ----------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms in which a plan was prepared, one entry each time."""
    calls: list[str] = []
    for name, form in list(EXECUTION_FORMS.items()):

        def count(*arguments: Any, name: str = name, prepare: Callable[..., Any] = form.prepare) -> Any:
            calls.append(name)
            return prepare(*arguments)

        monkeypatch.setitem(EXECUTION_FORMS, name, form._replace(prepare=count))
    return calls


def step(module: nn.Module, make: Callable[..., torch.optim.Optimizer], compiled: bool = False, **options: Any) -> None:
    """One step of an optimizer, without a call of the module before it."""
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(module.parameters(), lr=0.1, **options)
    (torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step)()
    optimizer.zero_grad()


def first_bank(module: nn.Module) -> nn.Parameter:
    return max(module.parameters(), key=torch.Tensor.numel)


MAKES_NO_DIFFERENCE = ("train mode and back",)
CHANGES: dict[str, Callable[[ShiftwiseConv2d], object]] = {
    "a parameter in place": lambda m: first_bank(m).mul_(2),
    "a bias in place": lambda m: min(m.parameters(), key=torch.Tensor.numel).add_(1),
    "a state loaded": lambda m: m.load_state_dict(
        {name: t * 1.5 if t.is_floating_point() else t for name, t in m.state_dict().items()}
    ),
    "a step of SGD": lambda m: step(m, torch.optim.SGD),
    "a step of AdamW, foreach": lambda m: step(m, torch.optim.AdamW, foreach=True),
    "a step of AdamW, fused": lambda m: step(m, torch.optim.AdamW, fused=True),
    "a compiled step of SGD": lambda m: step(m, torch.optim.SGD, compiled=True),
    "a compiled step of SGD, fused": lambda m: step(m, torch.optim.SGD, compiled=True, fused=True),
    "train mode and back": lambda m: m.train().eval(),
    "cast there and back": lambda m: m.half().float(),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "form"),
    sample(
        product(["strips", "square"], ["assembled", "gemm", "toeplitz", "shift"]),
        [("strips", "assembled"), ("square", "gemm"), ("square", "toeplitz"), ("strips", "shift")],
    ),
)
def test_a_plan_is_prepared_once_after_each_change(name: str, form: str, prepared: list[str]) -> None:
    module, x = layer(name, form), maps()
    before = module(x)
    for change, make in CHANGES.items():
        make(module)
        expected = copy.deepcopy(module)(x)
        prepared.clear()
        for _ in range(3):
            assert torch.equal(module(x), expected), change
        assert prepared == [module.decision.form], change
        assert (error(expected, before) > 1e-4) == (change not in MAKES_NO_DIFFERENCE), change
        before = expected


@torch.no_grad()
@every_form
def test_a_plan_is_prepared_anew_for_statistics_of_a_batch_norm(form: str, prepared: list[str]) -> None:
    module, x = layer("strips", form), maps()
    norm = module.branches[1].bn
    before = module(x)
    norm.running_var.mul_(2)
    prepared.clear()
    after = module(x)
    assert torch.equal(after, module(x))
    assert len(prepared) == 1
    assert error(after, before) > 1e-3
    norm.train()  # the child alone: batch statistics, which no plan can hold
    prepared.clear()
    with_batch_statistics = module(x)
    module(x)
    assert len(prepared) == 2
    assert error(with_batch_statistics, after) > 1e-3
    norm.eval()
    expected = copy.deepcopy(module)(x)
    prepared.clear()
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)
    assert len(prepared) == 1


@torch.no_grad()
def test_a_plan_is_prepared_anew_for_other_calls(prepared: list[str]) -> None:
    """A map of another size, layout or dtype; a batch beyond the limit of few images; another form; another mode."""
    module = layer("strips")
    few, many = maps(FEW_IMAGES), maps(FEW_IMAGES + 1)
    calls: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: module(few), 1),
        (lambda: module(few[:1]), 0),
        (lambda: module(many), 1),
        (lambda: module(maps(FEW_IMAGES + 9)), 0),
        (lambda: module(few), 1),
        (lambda: module(maps(2, (10, 12))), 1),
        (lambda: module(maps(2, (7, 7))), 1),
        (lambda: module(maps(2, (7, 7))), 0),
    ]
    for form in ("shift", "toeplitz", "assembled"):
        calls.append((lambda form=form: (setattr(module, "form", form), module(few))[1], 1))
    for number, (call, expected) in enumerate(calls):
        prepared.clear()
        call()
        assert len(prepared) == expected, number
    prepared.clear()
    with torch.inference_mode():
        module(few)
        module(few)
    assert len(prepared) == 1
    module(few)
    assert len(prepared) == 2


def test_no_plan_is_kept_in_train_mode(prepared: list[str]) -> None:
    module = layer("strips").train()
    for _ in range(2):
        module(maps()).sum().backward()
    assert len(prepared) == 2


def test_another_thread_may_call_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment after a plan is stored is the worst one for another thread to store its own: as if one did."""
    module, x, other = layer("strips", "gemm"), maps(), maps(2, (7, 9))
    with torch.no_grad():
        expected = copy.deepcopy(module)(x)

    def interrupted(self: Planner, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if self is module._planner and name == "_kept" and value is not None:
            monkeypatch.delattr(Planner, "__setattr__")
            with torch.no_grad():
                module(other)

    monkeypatch.setattr(Planner, "__setattr__", interrupted, raising=False)
    with torch.no_grad():
        got = module(x)
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


# ---- gradients on and off -------------------------------------------------------------------------------------------


def masked_layer(form: str) -> ShiftwiseConv2d:
    """The paper's, with a third of its filters in use."""
    module = layer("paper", form)
    generator = torch.Generator().manual_seed(0)
    for path in module.paths:
        path.set_mask(torch.rand(path.tile_count, generator=generator) < 0.3)
    return module


@every_form
@pytest.mark.parametrize("name", [*LAYERS, "masked"])
def test_inference_mode_first_and_gradients_later(name: str, form: str) -> None:
    """Tensors made in inference mode cannot be saved for a backward pass: none may be kept for one."""
    module = masked_layer(form) if name == "masked" else layer(name, form)
    x = maps()
    with torch.inference_mode():
        first = module(x)
    with torch.no_grad():
        assert error(module(x), first.clone()) <= BOUND
    y = module(x)
    assert error(y, first.clone()) <= BOUND
    y.sum().backward()
    module.train()(x).sum().backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(module).values())
    frozen = module.eval().requires_grad_(False)
    for _ in range(2):
        with torch.inference_mode():
            frozen(x)
        wanted = maps().requires_grad_()
        frozen(wanted).sum().backward()
        assert wanted.grad is not None


@every_form
@every_layer
def test_a_frozen_layer_passes_gradients_on(name: str, form: str, prepared: list[str]) -> None:
    module, plain = layer(name, form).requires_grad_(False), reference(name)
    x = maps(3).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(wide).square().sum(), wide)
    with torch.no_grad():
        module(x)
    for _ in range(3):
        (got,) = torch.autograd.grad(module(x).square().sum(), x)
        assert error(got, expected) <= 10 * BOUND
    assert len(prepared) == 1
    assert not gradients(module)


# ---- torch.func and forward-mode differentiation --------------------------------------------------------------------


def other_weights(module: nn.Module) -> dict[str, Tensor]:
    """Plain tensors, as torch.func takes them."""
    return {name: parameter.detach() * 1.5 + 0.01 for name, parameter in module.named_parameters()}


def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(module)
    twin.load_state_dict(weights, strict=False)
    return twin


@torch.no_grad()
@every_form
@every_layer
def test_functional_call_takes_other_weights(name: str, form: str) -> None:
    module, x = layer(name, form), maps()
    before, weights = module(x), other_weights(module)
    assert torch.equal(functional_call(module, weights, (x,)), with_weights(module, weights)(x))
    assert torch.equal(module(x), before)


@every_form
@every_layer
def test_gradients_of_torch_func(name: str, form: str) -> None:
    module, x = layer(name, form, torch.float64), maps().double()
    weights = other_weights(module)
    got = torch.func.grad(lambda values: functional_call(module, values, (x,)).square().sum())(weights)
    twin = with_weights(module, weights)
    twin(x).square().sum().backward()
    assert got.keys() == gradients(twin).keys()
    assert error(joined(got), joined(gradients(twin))) <= 10 * EXACT


@every_form
@every_layer
def test_a_plan_made_inside_a_transform_does_not_leave_it(name: str, form: str) -> None:
    module, x = layer(name, form, torch.float64).requires_grad_(False), maps().double()
    got = torch.func.grad(lambda values: module(values).square().sum())(x)
    wide = x.clone().requires_grad_()
    module(wide).square().sum().backward()
    assert wide.grad is not None
    assert error(got, wide.grad) <= 10 * EXACT


@every_form
@every_layer
def test_forward_mode_gives_the_tangent_of_the_weights(name: str, form: str) -> None:
    """The module is linear in its tiles: the tangent is the output's difference."""
    module, x = layer(name, form, torch.float64).requires_grad_(False), maps().double()
    (largest,) = (key for key, parameter in module.named_parameters() if parameter is first_bank(module))
    bank = first_bank(module).detach()
    direction = torch.randn(bank.shape, generator=torch.Generator().manual_seed(0)).to(bank)

    def run(value: Tensor) -> Tensor:
        return functional_call(module, {largest: value}, (x,))

    expected = run(bank + direction) - run(bank)  # also fills the cache, which must not answer for the dual number
    assert error(torch.func.jvp(run, (bank,), (direction,))[1], expected) <= 100 * EXACT
    module(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(bank, direction))).tangent
    assert tangent is not None
    assert error(tangent, expected) <= 100 * EXACT


@torch.no_grad()
@every_form
@every_layer
def test_forward_mode_gives_the_tangent_of_the_map(name: str, form: str) -> None:
    """Also after calls without a tangent, which made themselves quick for the next one like them."""
    module, x = layer(name, form), maps()
    direction = maps(2, (10, 12)).reshape(x.shape)
    for _ in range(3):
        y = module(x)
    expected = module(x + direction) - y
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.contiguous(memory_format=memory_format), direction)
            tangent = forward_ad.unpack_dual(module(dual)).tangent
        assert tangent is not None
        assert error(tangent, expected) <= 10 * BOUND
        assert error(module(x.contiguous(memory_format=memory_format)), y) <= BOUND


@torch.no_grad()
@every_form
def test_a_parametrized_bank(form: str) -> None:
    class Twice(nn.Module):
        def forward(self, bank: Tensor) -> Tensor:
            return 2 * bank

    module, x = layer("square", form), maps()
    module.branches[0].bias.zero_()
    before = module(x)
    parametrize.register_parametrization(module.branches[0], "bank", Twice())
    assert error(module(x), 2 * before) <= BOUND
    module.branches[0].parametrizations.bank.original.mul_(3)
    assert error(module(x), 6 * before) <= BOUND


# ---- checkpointing, second derivatives, the same bits ----------------------------------------------------------------


@every_form
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(form: str, reentrant: bool) -> None:
    model, x = network(form).train(), images(3).requires_grad_()
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    expected = x.grad
    assert expected is not None
    x.grad = None
    y = x
    for part in model:
        y = checkpoint(part, y, use_reentrant=reentrant)
    y.square().sum().backward()
    assert error(x.grad, expected) <= (10 * BOUND if reentrant else 0)
    for name, gradient in gradients(twin).items():
        assert torch.equal(gradients(model)[name], gradient) or reentrant, name


@pytest.mark.parametrize("form", ["assembled", "gemm", "toeplitz", "shift"])
def test_second_derivatives(form: str) -> None:
    torch.manual_seed(0)
    module = convert(Strips(2, 5, 3, norm=False), SWConfig(min_kernel=5, form=form)).double().eval()
    assert isinstance(module, ShiftwiseConv2d)
    x = images(1, 2, (4, 3)).double().requires_grad_()
    leaves = (x, *module.parameters())

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return module(x).sin()  # alone it is linear in each of its inputs

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    assert module.decision is not None
    assert module.decision.form == form


@every_form
def test_ten_runs_give_the_same_bits(form: str) -> None:
    model, x = network(form).train(), images(4)

    def run() -> list[Tensor]:
        twin, leaf = copy.deepcopy(model), x.clone().requires_grad_()
        y = twin(leaf)
        y.square().sum().backward()
        assert leaf.grad is not None
        return [y.detach(), leaf.grad, *gradients(twin).values(), *twin.buffers()]

    first = run()
    for _ in range(9):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


# ---- copies and processes -------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("way", "form"),
    sample(product(COPIES, FORMS), [*product(["deepcopy"], FORMS), ("pickle", "toeplitz"), ("torch.save", "auto")]),
)
def test_a_copy_has_weights_of_its_own(way: str, form: str) -> None:
    model, x = network(form), images(2)
    before = model(x)
    twin = COPIES[way](model)
    assert torch.equal(twin(x), before)
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    assert error(twin(x), before) > 0.1
    assert torch.equal(model(x), before)


def distributed_models() -> dict[str, nn.Module]:
    """Models in train mode without a BatchNorm, and in eval mode with one: no number depends on the rest of a batch."""
    plain = {f"{form}, train": network(form, norm=False, dtype=torch.float64).train() for form in FORMS}
    return {**plain, **{f"{form}, eval": network(form, dtype=torch.float64) for form in FORMS}}


def _run_elsewhere(rank: int, models: dict[str, nn.Module], folder: Path) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        torch.save({form: model(images(2)) for form, model in models.items()}, folder / f"outputs{rank}.pt")
    meeting = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    results = {}
    for name, model in distributed_models().items():
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            parallel(images(6).double().chunk(2)[rank]).square().sum().backward()
            optimizer.step()
        results[name] = gradients(model)
    torch.save(results, folder / f"gradients{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """What two spawned processes wrote, which got models that had run; and what these gave in this process."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    folder = tmp_path_factory.mktemp("processes")
    models = {form: network(form) for form in FORMS}
    with torch.no_grad():
        outputs = {form: model(images(2)) for form, model in models.items()}
    torch.multiprocessing.spawn(_run_elsewhere, (models, folder), nprocs=2)
    return folder, outputs


def test_a_spawned_process_gets_the_model_with_a_warm_cache(two_processes: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = two_processes
    for form, y in torch.load(folder / "outputs0.pt").items():
        assert error(y, expected[form]) <= BOUND


def test_two_processes_get_the_gradients_of_the_joined_batch(two_processes: tuple[Path, dict[str, Tensor]]) -> None:
    first, second = (torch.load(two_processes[0] / f"gradients{rank}.pt") for rank in range(2))
    for name, model in distributed_models().items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            (model(images(6).double()).square().sum() / 2).backward()
            optimizer.step()
        expected = gradients(model)
        assert first[name].keys() == expected.keys()
        assert error(joined(first[name]), joined(expected)) <= 100 * EXACT, name
        assert torch.equal(joined(first[name]), joined(second[name])), name
