"""The networks against the published ones: goldens, names, shapes, parameter counts; and their building blocks."""

import json
import math
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

from sw_transplant.models import RepLKNet, SLaK, UniRepLKNet
from sw_transplant.models.large_kernel import ReparamLargeKernelConv, depthwise
from sw_transplant.models.staged import drop_path_rates
from sw_transplant.models.unireplknet import DILATED_BRANCHES, DilatedReparamBlock

FullSize = Callable[[str], nn.Module]
CLASSES = {"slak": SLaK, "replknet": RepLKNet, "unireplknet": UniRepLKNet}

# Millions of parameters, as the official code counts them.
PUBLISHED = {
    "slak_tiny": 50.7,
    "slak_small": 91.1,
    "slak_base": 158.0,
    "slak_large": 346.6,
    "replknet_31b": 79.9,
    "replknet_31l": 172.7,
    "replknet_xl": 335.4,
    "unireplknet_a": 4.6,
    "unireplknet_f": 6.5,
    "unireplknet_p": 11.1,
    "unireplknet_n": 18.8,
    "unireplknet_t": 31.7,
    "unireplknet_s": 56.5,
    "unireplknet_b": 99.1,
    "unireplknet_l": 220.1,
    "unireplknet_xl": 388.7,
}


@pytest.mark.parametrize("name", CLASSES)
def test_logits_equal_the_official_ones(name: str, shared: Path) -> None:
    config = json.loads((shared / "goldens" / "tiny_configs.json").read_text())[name]
    golden = load_file(shared / "goldens" / f"{name}_tiny.safetensors")
    weights = {key.removeprefix("model."): value for key, value in golden.items() if key.startswith("model.")}
    model = CLASSES[name](**config).eval()
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        logits = model(golden["input"])
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(name: str, shared: Path, full_size: FullSize) -> None:
    official = json.loads((shared / "goldens" / "state_dict_keys.json").read_text())[name]
    state = full_size(name).state_dict()
    # In order too: optimiser states of official checkpoints go by the order of the parameters.
    assert [(key, list(value.shape)) for key, value in state.items()] == list(official.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str, full_size: FullSize) -> None:
    millions = sum(parameter.numel() for parameter in full_size(name).parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name], abs=0.05)


@pytest.mark.parametrize(
    "block",
    [
        ReparamLargeKernelConv(4, {"LoRA1": (7, 3), "LoRA2": (3, 7), "small_conv": (3, 3)}),
        DilatedReparamBlock(4, 13),
    ],
    ids=lambda block: type(block).__name__,
)
def test_large_kernel_block_is_a_sum_of_conv_bn_branches_of_one_input(block: nn.Module) -> None:
    graph = fx.symbolic_trace(block).graph
    modules = dict(block.named_modules())
    convs = [n for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], nn.Conv2d)]
    norms = [n for n in graph.nodes if n.op == "call_module" and isinstance(modules[n.target], nn.BatchNorm2d)]
    adds = [n for n in graph.nodes if n.op == "call_function" and n.target is operator.add]
    (entry,) = [n for n in graph.nodes if n.op == "placeholder"]
    assert len(convs) == len(norms) == len(adds) + 1 > 1
    assert len(convs) + len(norms) + len(adds) + 2 == len(graph.nodes)
    assert all(conv.args == (entry,) for conv in convs)
    assert {norm.args[0] for norm in norms} == set(convs)


@pytest.mark.parametrize("kernel_size", DILATED_BRANCHES)
def test_dilated_branches_lie_within_the_large_kernel(kernel_size: int) -> None:
    x = torch.randn(1, 4, 6, 9)
    assert DilatedReparamBlock(4, kernel_size)(x).shape == x.shape
    assert all((size - 1) * dilation + 1 <= kernel_size for size, dilation in DILATED_BRANCHES[kernel_size])


def test_slak_without_decomposition_has_square_kernels() -> None:
    model = SLaK(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), kernel_size=(9, 7, 7, 7, 3), num_classes=0, Decom=False)
    kernels = [tuple(m.kernel_size) for m in model.stages[0].modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(9, 9), (3, 3)]


def test_slak_without_layer_scale_has_no_gamma() -> None:
    model = SLaK(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), kernel_size=(7, 7, 7, 7, 3), layer_scale_init_value=0)
    assert not any("gamma" in name for name, _ in model.named_parameters())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize("model_class", [SLaK, UniRepLKNet])
def test_head_init_scale_multiplies_the_initial_classifier(model_class: type[nn.Module]) -> None:
    heads = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        depths = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}
        kernels = {"kernel_sizes": ((3,),) * 4} if model_class is UniRepLKNet else {}
        heads.append(model_class(**depths, **kernels, head_init_scale=scale).head.weight)
    torch.testing.assert_close(heads[1], heads[0] * 0.25)


@pytest.mark.parametrize(
    ("model_class", "settings", "message"),
    [
        (SLaK, {"depths": (3, 3, 9)}, r"SLaK: depths=\(3, 3, 9\) has 3 entries, expected 4"),
        (SLaK, {"kernel_size": (51, 49, 47, 13)}, "kernel_size=.* has 4 entries, expected 5"),
        (SLaK, {"kernel_size": (50, 49, 47, 13, 5)}, "must be odd"),
        (SLaK, {"global_pool": "median"}, "global_pool 'median' is not one of"),
        (RepLKNet, {"channels": (8, 8)}, "channels=.* has 2 entries, expected 4"),
        (RepLKNet, {"small_kernel": 4}, "must be odd"),
        (UniRepLKNet, {"depths": (1, 1, 1, 1)}, r"expected one per block, \[1, 1, 1, 1\]"),
        (UniRepLKNet, {"depths": (1, 1, 1, 1), "kernel_sizes": ((3,), (19,), (3,), (3,))}, "kernel size 19 .* not one"),
    ],
)
def test_bad_settings_are_refused(model_class: type[nn.Module], settings: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        model_class(**settings)


def test_depthwise_refuses_even_kernels() -> None:
    with pytest.raises(ValueError, match=r"kernel size \(7, 4\)"):
        depthwise(8, (7, 4))


def test_drop_path_rates_rise_linearly_over_all_blocks() -> None:
    rates = drop_path_rates(0.4, (1, 1, 2, 1))
    assert [len(stage) for stage in rates] == [1, 1, 2, 1]
    flat = [rate for stage in rates for rate in stage]
    assert all(math.isclose(rate, 0.1 * i) for i, rate in enumerate(flat))
    assert drop_path_rates(0.4, (0, 0, 1, 0)) == [[], [], [0.0], []]


def test_replknet_normalises_the_map_and_not_its_mean() -> None:
    # In eval mode the two orders agree; in training the statistics differ.
    model = RepLKNet((7, 7, 7, 7), (1, 1, 1, 1), (4, 4, 4, 4), small_kernel=3, num_classes=0).train()
    features = model.forward_features(torch.randn(2, 3, 96, 64))
    out = model.forward_head(features)
    mean, variance = features.mean((0, 2, 3)), features.var((0, 2, 3), unbiased=False)
    expected = (features.mean((2, 3)) - mean) / (variance + model.norm.eps).sqrt()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
