"""Converted models on a GPU: every form against float64, CUDA graphs, streams, several devices, compiled code."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sw_transplant import ShiftwiseConv2d, summary, tune
from sw_transplant.check.verify import BOUNDS, TF32_BOUND, bound_for
from sw_transplant.cuda import launch
from sw_transplant.forms import FORMS as EXECUTION_FORMS
from sw_transplant.ops import toeplitz_selftest
from tests.runtime_models import CHANNELS, FORMS, LAYERS, error, gradients, images, joined, layer, network, original

pytestmark = pytest.mark.gpu
every_form = pytest.mark.parametrize("form", FORMS)
every_layer = pytest.mark.parametrize("name", LAYERS)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SMALL, LARGE = (12, 10), (29, 30)  # a map for the matrix over the whole map, and one beyond
NUMBERS = [("ieee", torch.float32), ("tf32", torch.float32), ("ieee", torch.float16), ("ieee", torch.bfloat16)]


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Sets how convolutions and matrix products multiply float32: "ieee" or "tf32"."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]

    def choose(*modes: str) -> None:
        for backend, mode in zip(backends, modes * (len(backends) // len(modes)), strict=True):
            backend.fp32_precision = mode

    yield choose
    choose(*before)


@pytest.fixture(autouse=True)
def _exact(precision: Callable[[str], None]) -> None:
    precision("ieee")


def maps(batch: int, size: tuple[int, int] = SMALL) -> Tensor:
    return images(batch, CHANNELS, size)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def bound(mode: str, dtype: torch.dtype) -> float:
    return TF32_BOUND if (mode, dtype) == ("tf32", torch.float32) else BOUNDS[dtype]


def layers_of(model: nn.Module) -> list[ShiftwiseConv2d]:
    return [module for module in model.modules() if isinstance(module, ShiftwiseConv2d)]


# ---- numbers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@every_form
@every_layer
@pytest.mark.parametrize(("mode", "dtype"), NUMBERS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_form_against_float64(
    name: str, form: str, mode: str, dtype: torch.dtype, layout: torch.memory_format, precision: Callable[[str], None]
) -> None:
    precision(mode)
    module = layer(name, form, dtype).cuda()
    plain = original(name).double()
    for batch, size in ((1, SMALL), (33, SMALL), (2, LARGE)):
        x = maps(batch, size).to(dtype)
        expected = plain(x.double())
        for _ in range(2):  # prepared, and from the cache
            y = module(x.cuda().contiguous(memory_format=layout))
            assert y.dtype is dtype
            assert y.is_contiguous(memory_format=layout)
            assert error(y.cpu(), expected) <= bound(mode, dtype), (batch, size)


@every_form
@every_layer
@pytest.mark.parametrize("mode", ["ieee", "tf32"])
def test_training_step_against_float64(name: str, form: str, mode: str, precision: Callable[[str], None]) -> None:
    precision(mode)
    for batch, size in ((5, SMALL), (2, LARGE)):
        module, double = layer(name, form).cuda().train(), layer(name, "assembled", torch.float64).train()
        x = maps(batch, size)
        given, wide = leaf(x.cuda()), leaf(x.double())
        y, expected = module(given), double(wide)
        assert error(y.cpu(), expected) <= bound(mode, torch.float32)
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        (y * weights.cuda()).sum().backward()
        (expected * weights).sum().backward()
        assert given.grad is not None
        assert wide.grad is not None
        assert error(given.grad.cpu(), wide.grad) <= 10 * bound(mode, torch.float32)
        got = {key: gradient.cpu() for key, gradient in gradients(module).items()}
        assert error(joined(got), joined(gradients(double))) <= 10 * bound(mode, torch.float32)


@every_form
@every_layer
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_autocast(name: str, form: str, train: bool) -> None:
    module, double = layer(name, form).cuda().train(train), layer(name, "assembled", torch.float64).train(train)
    x = maps(4)
    given, wide = leaf(x.cuda()), leaf(x.double())
    with torch.autocast("cuda", torch.float16):
        y = module(given)
        with torch.no_grad():
            assert module.eval()(given).dtype is torch.float16
        with torch.autocast("cuda", enabled=False), torch.no_grad():
            assert module(given).dtype is torch.float32
    assert y.dtype is torch.float16
    expected = double(wide)
    assert error(y.cpu(), expected) <= BOUNDS[torch.float16]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (y.float() * weights.cuda()).sum().backward()
    (expected * weights).sum().backward()
    assert given.grad is not None
    assert wide.grad is not None
    assert error(given.grad.cpu(), wide.grad) <= 10 * BOUNDS[torch.float16]
    assert {gradient.dtype for gradient in gradients(module).values()} == {torch.float32}


@every_form
@every_layer
def test_a_hundred_runs_give_the_same_bits(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # for the convolutions that are PyTorch's own
    module, x = layer(name, form).cuda().train(), leaf(maps(9, LARGE).cuda())
    leaves = [x, *module.parameters()]

    def run() -> list[Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    first = run()
    for _ in range(99):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


# ---- CUDA graphs and streams ----------------------------------------------------------------------------------------


@torch.no_grad()
@every_form
def test_captured_in_a_graph(form: str) -> None:
    """A replay reads its input and the weights as they are, and needs nothing that the model may drop meanwhile."""
    model, x = network(form).cuda(), images(3).cuda()
    first = model(x)  # compiles what there is to compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x)
    assert error(model(x), first) <= BOUNDS[torch.float32]  # takes nothing from the capture, which has not run yet

    x.copy_(images(3, 3, (10, 12)).reshape(x.shape))
    expected = copy.deepcopy(model)(x)
    assert error(first, expected) > 0.01
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, expected) <= BOUNDS[torch.float32]

    for size in (SMALL, LARGE, (7, 7)):  # other plans, in the place of the one that the model had
        model(images(2, 3, size).cuda())
    garbage = [torch.full((2**k,), float("nan"), device="cuda") for k in range(4, 22) for _ in range(8)]
    graph.replay()
    torch.cuda.synchronize()
    del garbage
    assert error(out, expected) <= BOUNDS[torch.float32]

    for parameter in model.parameters():
        parameter.mul_(1.1)
    expected = copy.deepcopy(model)(x)
    assert error(out, expected) > 0.01
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, expected) <= BOUNDS[torch.float32]
    assert error(model(x), expected) <= BOUNDS[torch.float32]


def sleep() -> None:
    """Keeps the current stream busy for longer than it takes to start what follows."""
    torch.cuda._sleep(200_000_000)


@torch.no_grad()
@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_another_stream(form: str, dtype: torch.dtype) -> None:
    """What a model does not start on the current stream overtakes the input, which is late."""
    model, x = network(form, dtype=dtype).cuda(), images(3).cuda().to(dtype)
    expected = model(2 * x)
    model.eval()  # forgets its plans
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.full_like(x, float("nan"))
        sleep()
        late.copy_(2 * x)
        got = model(late)
    stream.synchronize()
    assert error(got, expected) <= BOUNDS[dtype]


@every_form
def test_a_training_step_on_another_stream(form: str) -> None:
    model, x = network(form).cuda().train(), images(3).cuda()
    twin = copy.deepcopy(model)
    twin(2 * x).square().sum().backward()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.full_like(x, float("nan"))
        sleep()
        late.copy_(2 * x)
        model(late).square().sum().backward()
    stream.synchronize()
    assert error(joined(gradients(model)), joined(gradients(twin))) <= 10 * BOUNDS[torch.float32]


@torch.no_grad()
@every_form
def test_a_plan_of_another_stream_is_not_taken_before_it_is_ready(form: str) -> None:
    model, x = network(form).cuda(), images(3).cuda()
    expected = model(x)
    model.eval()  # forgets its plans
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for power in range(4, 22):  # memory that the plans will get, so that one that is not ready is all NaN
            torch.full((2**power,), float("nan"), device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sleep()
        model(x)
    got = model(x)  # on the default stream, while the other one is asleep
    torch.cuda.synchronize()
    assert error(got, expected) <= BOUNDS[torch.float32]


@two_devices
@torch.no_grad()
@every_form
def test_on_a_device_that_is_not_the_current_one(form: str) -> None:
    model, x = network(form), images(3)
    expected = copy.deepcopy(model).double()(x.double())
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        got = model.to(device)(x.to(device))
        assert got.device == torch.device(device)
        assert error(got.cpu(), expected) <= BOUNDS[torch.float32]
    assert torch.cuda.current_device() == 0


@two_devices
@every_form
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_data_parallel(form: str, norm: bool) -> None:
    """Replicas hold plain tensors where the module has Parameters."""
    model, x = network(form, norm=norm).cuda(0), images(6).cuda(0)
    twin = copy.deepcopy(model)
    got, expected = nn.DataParallel(model, [0, 1])(x), twin(x)
    assert error(got, expected) <= BOUNDS[torch.float32]
    got.square().sum().backward()
    expected.square().sum().backward()
    assert error(joined(gradients(model)), joined(gradients(twin))) <= 10 * BOUNDS[torch.float32]


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@every_form
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.usefixtures("_compiled_anew")
def test_compiled(form: str, mode: str) -> None:
    model = network(form).cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for change in range(5):
        x = images(3, 3, SMALL).cuda() + change
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x).clone()
        assert error(got, copy.deepcopy(model)(x)) <= BOUNDS[torch.float32]
        if change == 3:  # by now a graph has been recorded
            for parameter in model.parameters():
                parameter.mul_(1.1)


@every_form
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.usefixtures("_compiled_anew")
def test_a_compiled_training_step(form: str, mode: str) -> None:
    model = network(form).cuda().train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for batch in range(3):
        x = images(4, 3, SMALL).cuda() + batch
        torch.compiler.cudagraph_mark_step_begin()
        for one, call in ((model, compiled), (twin, twin)):
            one.zero_grad()
            call(x).square().sum().backward()
        assert error(joined(gradients(model)), joined(gradients(twin))) <= 10 * BOUNDS[torch.float32]


# ---- which form runs ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_auto_says_what_it_takes_and_why() -> None:
    module = layer("strips").cuda()
    kernels = not toeplitz_selftest.why_no_kernel(torch.cuda.current_device())
    for dtype, size, form in (
        (torch.float32, SMALL, "gemm"),
        (torch.float32, LARGE, "toeplitz" if kernels else "assembled"),
        (torch.float16, LARGE, "toeplitz" if kernels else "assembled"),
        (torch.float64, SMALL, "gemm"),
        (torch.float64, LARGE, "assembled"),
    ):
        module.to(dtype)(maps(2, size).cuda().to(dtype))
        assert module.decision is not None
        assert module.decision.form == form, (dtype, size)
        assert module.decision.reason
        table = str(summary(nn.Sequential(module)))
        assert form in table
        assert module.decision.reason.split()[0] in table


@torch.no_grad()
@every_layer
def test_a_form_that_cannot_run_is_replaced_and_said_so(name: str) -> None:
    for form in EXECUTION_FORMS:
        module = layer(name, form, torch.float64).cuda()
        module(maps(2).double().cuda())
        assert module.decision is not None
        replaced = form == "toeplitz"  # float64 has no kernel
        assert module.decision.form == ("assembled" if replaced else form)
        assert module.decision.reason.startswith("toeplitz " if replaced else "asked for")


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    """Whether kernels run is asked once; here again, and after the test."""
    asked = (launch._why_not, toeplitz_selftest._why_no_kernel, *toeplitz_selftest.SELF_TESTS.values())
    for question in asked:
        question.cache_clear()
    yield
    for question in asked:
        question.cache_clear()


@torch.no_grad()
@pytest.mark.usefixtures("_asked_anew")
def test_without_numba_plain_pytorch_runs_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", "")  # where kernels are on disk, nobody needs Numba
    launch._loaded.cache_clear()
    x = maps(3, LARGE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in LAYERS:
            plain = original(name).double()
            for form in FORMS:
                module = layer(name, form).cuda()
                for _ in range(2):
                    assert error(module(x.cuda()).cpu(), plain(x.double())) <= BOUNDS[torch.float32]
                assert module.decision is not None
                assert module.decision.form != "toeplitz"
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    ours = [message for message in messages if "sw_transplant" in message]
    assert len(ours) == 1, ours
    assert "pip install" in ours[0]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_tuning(train: bool) -> None:
    model, x = network().cuda().train(train), images(4, 3, LARGE).cuda()
    before = copy.deepcopy(model)
    with torch.set_grad_enabled(train):
        report = tune(model, x, rounds=3)
    assert len(report.layers) == len(layers_of(model)) == 3
    for tuned, module in zip(report.layers, layers_of(model), strict=True):
        assert module.form == tuned.form in ("auto", *tuned.milliseconds)
        assert tuned.form != tuned.default
        assert {"assembled", "shift"} <= tuned.milliseconds.keys()
        assert all(milliseconds > 0 for milliseconds in tuned.milliseconds.values())
    for tensor, old in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(tensor, old)
    with torch.no_grad():
        assert error(model.eval()(x), before.eval()(x)) <= bound_for(torch.float32, "cuda")
