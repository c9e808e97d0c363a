"""ShiftwiseConv2d against the plain convolutions that it stands for: values, gradients, BatchNorm, cache."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sw_transplant import ShiftwiseConv2d, convert
from sw_transplant.check.verify import BOUNDS
from sw_transplant.geometry import BranchGeometry
from sw_transplant.layers.branch import Branch
from tests.sampling import sample

FORMS = ["shift", "assembled", "toeplitz"]
EXACT = BOUNDS[torch.float64]


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


def centred(size, dilation=1):
    vertical, horizontal = (dilation * (k // 2) for k in size)
    return BranchGeometry(size, (vertical, vertical, horizontal, horizontal), (dilation, dilation))


def random_bn(channels, dtype=torch.float64):
    bn = nn.BatchNorm2d(channels, dtype=dtype)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn


class Sum(nn.Module):
    """The original: depthwise convolutions of one input, each with its BatchNorm; None is the identity."""

    def __init__(self, channels, kernels, dtype=torch.float64):
        super().__init__()
        self.kernels = kernels
        self.convs = nn.ModuleList(
            nn.Conv2d(
                channels,
                channels,
                size,
                padding=g.padding[::2],
                dilation=g.dilation,
                groups=channels,
                bias=i == 0,
                dtype=dtype,
            )
            for i, (size, g) in enumerate((k.kernel_size, k) for k in kernels if k)
        )
        self.bns = nn.ModuleList(random_bn(channels, dtype) for _ in kernels)

    def forward(self, x):
        convs = iter(self.convs)
        return sum(bn(next(convs)(x) if kernel else x) for kernel, bn in zip(self.kernels, self.bns, strict=True))

    def as_shiftwise(self, tile=5, form="auto"):
        convs, branches = iter(self.convs), []
        for kernel, bn in zip(self.kernels, self.bns, strict=True):
            bn = copy.deepcopy(bn)
            if kernel is None:
                branches.append(Branch.identity(bn.num_features, tile, bn.weight, bn))
            else:
                conv = next(convs)
                branches.append(Branch.from_kernel(kernel, conv.weight, tile, bias=conv.bias, bn=bn))
        channels = self.bns[0].num_features
        return ShiftwiseConv2d(channels, channels, (1, 1), branches, form=form).train(self.training)


SUMS = {
    "slak": [centred((51, 5)), centred((5, 51)), centred((5, 5))],
    "unireplknet": [centred((13, 13)), centred((5, 5)), centred((7, 7), 2), centred((3, 3), 3), centred((3, 3), 5)],
    "fastvit": [centred((7, 7)), centred((3, 3)), None],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (3, 1, 2, 5), "same", "centred"])
@pytest.mark.parametrize(
    ("size", "stride", "dilation", "multiplier", "tile"),
    [
        ((51, 5), (1, 1), (1, 1), 1, 5),
        ((7, 7), (2, 2), (1, 1), 2, 4),
        ((4, 6), (3, 2), (2, 1), 1, 5),
        ((13, 13), (1, 2), (3, 3), 1, 5),
        ((1, 11), (2, 1), (1, 1), 3, 1),
        ((31, 31), (1, 1), (1, 1), 1, 7),
    ],
)
def test_one_convolution(size, stride, dilation, multiplier, tile, padding, form):
    torch.manual_seed(0)
    if padding == "centred":
        padding = tuple(d * (k // 2) for k, d in zip(size, dilation, strict=True) for _ in range(2))
    geometry = BranchGeometry(size, padding, dilation)
    weight = torch.randn(3 * multiplier, 1, *size, dtype=torch.float64)
    bias = torch.randn(3 * multiplier, dtype=torch.float64)
    module = ShiftwiseConv2d(
        3, 3 * multiplier, stride, [Branch.from_kernel(geometry, weight, tile, bias=bias)], form=form
    )
    for height, width in [(64, 70), (33, 53), (5, 9)]:
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        top, bottom, left, right = geometry.resolve((height, width), stride)
        if height + top + bottom <= geometry.reach[0] or width + left + right <= geometry.reach[1]:
            with pytest.raises(ValueError, match=r"is smaller than the kernel"):
                module(x)
            continue
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        expected = F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, stride, 0, dilation, 3)
        y = module(x)
        assert y.shape == expected.shape
        assert error(y, expected) <= EXACT
        grad = torch.randn_like(y)
        bank = module.branches[0].bank
        got = torch.autograd.grad(y, (x, bank, module.branches[0].bias), grad)
        wanted = torch.autograd.grad(expected, (x, w, b), grad)
        assert error(got[0], wanted[0]) <= 10 * EXACT
        assert error(Branch.from_kernel(geometry, wanted[1], tile).bank, got[1]) <= 10 * EXACT
        assert error(got[2], wanted[2]) <= 10 * EXACT
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.bias, bias)
    assert (module.kernel_size, module.stride, module.dilation, module.groups) == (size, stride, dilation, 3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SUMS)
def test_sum_of_branches_in_eval_and_train(name, form):
    torch.manual_seed(0)
    original = Sum(6, SUMS[name]).eval()
    module = original.as_shiftwise(form=form)
    x = torch.randn(2, 6, 17, 22, dtype=torch.float64)
    assert error(module(x), original(x)) <= EXACT
    with torch.no_grad():
        assert error(module(x), original(x)) <= EXACT
    original.train(), module.train()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(x1), original(x2)
    assert error(y, expected) <= EXACT
    for branch, bn in zip(module.branches, original.bns, strict=True):
        assert error(branch.bn.running_mean, bn.running_mean) <= EXACT
        assert error(branch.bn.running_var, bn.running_var) <= EXACT
        assert branch.bn.num_batches_tracked == bn.num_batches_tracked
    grad = torch.randn_like(y)
    y.backward(grad), expected.backward(grad)
    assert error(x1.grad, x2.grad) <= 10 * EXACT
    convs = iter(original.convs)
    for branch, bn in zip(module.branches, original.bns, strict=True):
        assert error(branch.bn.weight.grad, bn.weight.grad) <= 10 * EXACT
        if not branch.is_identity:
            kernel = next(convs).weight.grad
            laid = Branch.from_kernel(branch.geometry, kernel, branch.bank.shape[-1]).bank
            # The gradient of a kernel before a BatchNorm is a small difference of large sums.
            assert (branch.bank.grad - laid).norm() <= 1e-9 * laid.norm()


@pytest.mark.parametrize("form", FORMS)
def test_frozen_batch_norm_in_a_training_module(form):
    """Some BatchNorms use batch statistics and others running ones; gradients flow through both."""
    torch.manual_seed(0)
    original = Sum(4, SUMS["slak"]).train()
    original.bns[1].eval()
    module = original.as_shiftwise(form=form)
    module.branches[1].bn.eval()
    x = torch.randn(2, 4, 12, 9, dtype=torch.float64)
    y, expected = module(x), original(x)
    assert error(y, expected) <= EXACT
    y.square().mean().backward(), expected.square().mean().backward()
    assert error(module.branches[1].bn.weight.grad, original.bns[1].weight.grad) <= 10 * EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_stays_within_its_bound(dtype, form):
    torch.manual_seed(0)
    original = Sum(6, SUMS["slak"]).eval()
    module = original.as_shiftwise(form=form).to(dtype)
    x = torch.randn(2, 6, 17, 22).to(dtype)
    expected = copy.deepcopy(original).to(dtype).double()(x.double())
    y = module(x)
    assert y.dtype == dtype
    assert error(y.double(), expected) <= BOUNDS[dtype]


def test_filled_taps_stay_zero_whatever_an_optimizer_does():
    geometry = centred((7, 7))
    weight = torch.randn(2, 1, 7, 7)
    for form in FORMS:
        module = ShiftwiseConv2d(2, 2, (1, 1), [Branch.from_kernel(geometry, weight, 4)], form=form)
        bank = module.branches[0].bank
        filling = ~module.branches[0].support.expand_as(bank)
        with torch.no_grad():
            bank[filling] = 7.0  # what an optimizer with momentum from elsewhere might leave there
        x = torch.randn(1, 2, 9, 9)
        y = module(x)
        torch.testing.assert_close(y, F.conv2d(x, weight, None, 1, 3, 1, 2))
        y.square().sum().backward()
        assert filling.any()
        assert torch.equal(bank.grad[filling], torch.zeros(int(filling.sum())))
        assert torch.equal(module.weight, weight)


def test_branches_are_joined_where_that_adds_no_work():
    sizes = {
        name: sorted(tuple(k.weight.shape[2:]) for k in Sum(2, kernels).as_shiftwise().kernels()[0])
        for name, kernels in SUMS.items()
    }
    assert sizes == {"slak": [(5, 51), (51, 5)], "unireplknet": [(13, 13)], "fastvit": [(7, 7)]}


def test_unjoinable_dilations_stay_apart_and_agree():
    torch.manual_seed(0)
    original = Sum(2, [centred((3, 3), 3), centred((3, 3), 5)]).eval()
    module = original.as_shiftwise(tile=3)
    assert len(module.kernels()[0]) == 2
    x = torch.randn(1, 2, 15, 16, dtype=torch.float64)
    assert error(module(x), original(x)) <= EXACT


@pytest.mark.parametrize("form", FORMS)
class TestCache:
    @pytest.fixture
    def module(self, form):
        torch.manual_seed(0)
        return Sum(4, SUMS["slak"]).eval().as_shiftwise(form=form)

    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)

    def fresh(self, module):
        twin = copy.deepcopy(module)
        twin.clear_cache()
        with torch.no_grad():
            return twin(self.x.to(module.branches[0].bank.dtype))

    @torch.no_grad()
    def test_is_used(self, module):
        module(self.x)
        first = module._planner._kept
        module(self.x)
        assert first is not None
        assert module._planner._kept is first

    CHANGES: ClassVar = {
        "parameter in place": lambda m: m.branches[0].bank.mul_(2),
        "buffer in place": lambda m: m.branches[0].bn.running_var.mul_(2),
        "parameter exchanged": lambda m: setattr(m.branches[1], "bank", nn.Parameter(m.branches[1].bank * 3)),
        "data exchanged": lambda m: setattr(m.branches[1].bank, "data", m.branches[1].bank.data * 3),
        "state loaded": lambda m: m.load_state_dict(
            {k: v * 2 for k, v in m.state_dict().items() if v.is_floating_point()}, strict=False
        ),
        "dtype": lambda m: m.float(),
        "train step": lambda m: (m.train(), m(TestCache.x), m.eval()),
        "form": lambda m: setattr(m, "form", "shift" if m.form == "assembled" else "assembled"),
    }

    @torch.no_grad()
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_renewed_after_a_change(self, module, change):
        before = module(self.x)
        self.CHANGES[change](module)
        after = module(self.x.to(module.branches[0].bank.dtype))
        assert torch.equal(after, self.fresh(module))
        if change not in ("dtype", "form"):
            assert not torch.allclose(after, before)

    def test_is_not_used_where_gradients_flow(self, module):
        with torch.no_grad():
            module(self.x)
        module(self.x).sum().backward()
        assert all(branch.bank.grad is not None for branch in module.branches)

    def test_of_inference_mode_does_not_leak_into_training_of_other_layers(self, module):
        with torch.inference_mode():
            module(self.x)
        module.requires_grad_(False)
        x = self.x.clone().requires_grad_()
        module(x).sum().backward()  # an inference tensor could not be saved for backward
        assert x.grad is not None

    @torch.no_grad()
    def test_is_neither_copied_nor_pickled(self, module):
        y = module(self.x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert twin._planner._kept is None
            assert torch.equal(twin(self.x), y)


def test_memory_format_follows_the_input():
    module = Sum(4, SUMS["slak"], torch.float32).eval().as_shiftwise()
    x = torch.randn(2, 4, 9, 9)
    for form in FORMS:
        module.form = form
        assert module(x).is_contiguous()
        assert module(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_input_without_batch_as_the_original_takes_it():
    x = torch.randn(4, 9, 9, dtype=torch.float64)
    conv = nn.Conv2d(4, 4, 7, padding=3, groups=4, dtype=torch.float64)
    assert torch.allclose(convert(conv)(x), conv(x), atol=1e-12)
    original = Sum(4, SUMS["slak"]).eval()
    for module in (original, original.as_shiftwise()):
        with pytest.raises(ValueError, match=r"expected 4D|without BatchNorm"):
            module(x)


def test_reparameterize_keeps_the_function_and_folds():
    torch.manual_seed(0)
    for kernels in SUMS.values():
        module = Sum(4, kernels).eval().as_shiftwise()
        x = torch.randn(1, 4, 14, 15, dtype=torch.float64)
        before = module(x)
        module.reparameterize()
        assert error(module(x), before) <= EXACT
        assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def test_kernels_without_running_statistics_are_refused():
    branch = Branch.from_kernel(
        centred((7, 7)), torch.randn(2, 1, 7, 7), 4, bn=nn.BatchNorm2d(2, track_running_stats=False)
    )
    module = ShiftwiseConv2d(2, 2, (1, 1), [branch]).eval()
    module(torch.randn(2, 2, 8, 8))  # runs, on batch statistics
    with pytest.raises(NotImplementedError, match=r"no running statistics"):
        module.kernels()


@pytest.mark.parametrize("form", sample(FORMS, ["shift"]))
def test_compiles_without_a_graph_break(form):
    module = Sum(4, SUMS["slak"], torch.float32).eval().as_shiftwise(form=form)
    x = torch.randn(1, 4, 9, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_is_a_leaf_to_fx():
    model = nn.Sequential(Sum(4, SUMS["slak"]).eval().as_shiftwise(), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    assert torch.equal(graph(x), model(x))


def branch(channels=4, size=(7, 7), padding=(3, 3, 3, 3)):
    return Branch.from_kernel(BranchGeometry(size, padding), torch.randn(channels, 1, *size), 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShiftwiseConv2d(4, 6, (1, 1), [branch(6)]), "out_channels 6, expected a multiple of in_channels 4"),
        (lambda: ShiftwiseConv2d(4, 4, (1, 1), []), "no branches"),
        (lambda: ShiftwiseConv2d(4, 4, (0, 1), [branch()]), "stride"),
        (lambda: ShiftwiseConv2d(4, 4, (1, 1), [branch(8)]), "bank of branch 0 has 8 channels, expected 4"),
        (lambda: ShiftwiseConv2d(4, 4, (1, 1), [branch(), branch(size=(5, 5))]), "outputs of different sizes"),
        (lambda: ShiftwiseConv2d(4, 4, (2, 2), [branch(), branch(padding="same")]), "single branch only"),
        (lambda: ShiftwiseConv2d(4, 4, (1, 1), [branch()], form="quick"), "form: got 'quick'"),
        (lambda: ShiftwiseConv2d(4, 4, (1, 1), [branch()])(torch.randn(1, 3, 9, 9)), r"\(1, 3, 9, 9\), expected"),
        (lambda: ShiftwiseConv2d(4, 4, (1, 1), [branch()])(torch.randn(9, 9)), "expected"),
        (lambda: BranchGeometry((0, 7), (0, 0, 0, 0)), "kernel_size"),
        (lambda: BranchGeometry((7, 7), (0, -1, 0, 0)), "padding"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_memory_format_of_a_model_is_kept(when):
    original = nn.Conv2d(6, 6, 7, padding=3, groups=6).eval()
    if when == "before":
        original.to(memory_format=torch.channels_last)
    module = convert(original)
    if when == "after":
        module.to(memory_format=torch.channels_last)
        original.to(memory_format=torch.channels_last)
    for x in (torch.randn(2, 6, 9, 8), torch.randn(2, 6, 9, 8).contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            for _ in range(3):
                y, expected = module(x), original(x)
                assert y.stride() == expected.stride()
                assert error(y, expected) <= 1e-6
    assert torch.equal(module.weight, original.weight)
