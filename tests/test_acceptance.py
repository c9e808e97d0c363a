"""Every model of the table keeps its function: in eval and in train mode, and through all that is done to models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from sw_transplant import (
    NoLargeKernelError,
    ShiftwiseConv2d,
    SWConfig,
    convert,
    inspect_model,
    load,
    merge,
    restore,
    save,
)
from sw_transplant.check.verify import bound_for
from sw_transplant.equivalence import lay_out
from sw_transplant.surgery.restore import dense_state_dict
from tests.acceptance import (
    CASES,
    Case,
    broken,
    case,
    largest_error,
    relative_rms,
    shiftwise_layers,
    tensors_of,
    with_form,
)
from tests.sampling import sample
from tests.snapshots import assert_same_model, assert_unchanged, snapshot

GRADIENT_FACTOR = 10  # gradients hold to ten times the bound of the outputs


@dataclass(frozen=True)
class Pair:
    """A model and its conversion, both in eval mode; tests that change one work on a copy."""

    case: Case
    min_kernel: int
    original: nn.Module
    converted: nn.Module
    before: object  # snapshot of the original from before the conversion

    @property
    def bound(self) -> float:
        return bound_for(self.case.dtype("eval"))


def make_pair(one: Case, min_kernel: int) -> Pair:
    original = one.model()
    before = snapshot(original)
    converted = convert(original, SWConfig(min_kernel=min_kernel))
    return Pair(one, min_kernel, original, converted, before)


def counterparts(original: nn.Module, converted: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules that a conversion keeps, before and after: all that is no part of a site, and the BatchNorms of sites."""
    layers = shiftwise_layers(converted)
    sites = {module for path in layers for module in original.get_submodule(path).modules()}
    for path, module in original.named_modules():
        if module not in sites:
            yield path, module, converted.get_submodule(path)
    for path, layer in layers.items():
        site = original.get_submodule(path)
        for branch, source in zip(layer.branches, layer.match.branches, strict=True):
            if source.bn is not None:
                yield f"{path}.{source.bn}", site.get_submodule(source.bn), branch.bn


PAIRS = [(one, min_kernel) for one in CASES for min_kernel, count in one.layers.items() if count]
NOTHING = [(one, min_kernel) for one in CASES for min_kernel, count in one.layers.items() if not count]


def _ids(pairs: list[tuple[Case, int]]) -> list[str]:
    return [f"{one.name} min_kernel={min_kernel}" for one, min_kernel in pairs]


# In the long tail alone: what has its family and its kernels in another row, and what is plain and takes seconds.
LATER = {
    *("timm coat_lite_tiny min_kernel=7", "timm efficientvit_m1 min_kernel=7", "timm edgenext_xx_small min_kernel=7"),
    *("timm fastvit_sa12 min_kernel=7", "timm focalnet_tiny_srf min_kernel=5", "timm mixnet_s min_kernel=7"),
    *("hf FocalNetForImageClassification min_kernel=7", "timm convnextv2_atto min_kernel=7"),
    *("timm mambaout_femto min_kernel=7", "hf EfficientNet b0 min_kernel=5"),
    *("timm convmixer_768_32 min_kernel=7", "timm maxxvitv2_nano_rw_256 min_kernel=7", "timm iformer_t min_kernel=7"),
}
QUICK = [one for one, name in zip(PAIRS, _ids(PAIRS), strict=True) if name not in LATER]


@pytest.fixture(scope="module", params=sample(PAIRS, QUICK, unpack=False), ids=_ids(PAIRS))
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(*request.param)


# ---- every model ----------------------------------------------------------------------------------------------------


def test_the_layers_are_converted_and_nothing_else_changes(pair: Pair) -> None:
    assert len(shiftwise_layers(pair.converted)) == pair.case.layers[pair.min_kernel]
    assert_unchanged(pair.original, pair.before)
    assert type(pair.converted) is type(pair.original)
    assert inspect.signature(pair.converted.forward) == inspect.signature(pair.original.forward)
    for path, old, new in counterparts(pair.original, pair.converted):
        assert type(new) is type(old), path
        assert new is not old, path
    everywhere = pair.converted.named_modules(remove_duplicate=False)
    places = tuple(f"{path}." for path, module in everywhere if isinstance(module, ShiftwiseConv2d))
    original, converted = (
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(places)}
        for model in (pair.original, pair.converted)
    )
    assert list(converted) == list(original)
    for name, tensor in original.items():
        assert torch.equal(converted[name], tensor), name


def test_restored_it_is_the_original_again(pair: Pair) -> None:
    restored = restore(pair.converted)
    assert_same_model(restored, pair.original)
    dense = dense_state_dict(pair.converted)
    assert list(dense) == list(restored.state_dict())
    for name, tensor in pair.original.state_dict().items():
        assert torch.equal(dense[name], tensor), name


def test_converting_again_changes_nothing(pair: Pair) -> None:
    config = SWConfig(min_kernel=pair.min_kernel)
    assert set(inspect_model(pair.converted, config).converted) == set(shiftwise_layers(pair.converted))
    before = snapshot(pair.converted)
    assert convert(pair.converted, config, inplace=True) is pair.converted
    assert_unchanged(pair.converted, before)


def test_same_function_in_eval_mode(pair: Pair) -> None:
    run, bound = pair.case.run, pair.bound
    with torch.no_grad():
        for size in dict.fromkeys(pair.case.sizes):
            images = pair.case.images(size)
            expected = run(pair.original, images)
            for form in ("assembled", "shift"):
                error = largest_error(run(with_form(pair.converted, form), images), expected)
                assert error <= bound, f"{form} at {size}: {error:.1e}"
        error = largest_error(run(with_form(broken(pair.converted), "assembled"), images), expected)
        assert error > 10 * bound, "the comparison does not see kernels that are one place off"


def test_same_step_in_train_mode(pair: Pair) -> None:
    dtype = pair.case.dtype("train")
    images = pair.case.images(pair.case.small, batch=2).to(dtype)
    original, converted = (copy.deepcopy(model).to(dtype).train() for model in (pair.original, pair.converted))
    expected, gradient, expected_rng = _step(pair.case, original, images)
    got, converted_gradient, rng = _step(pair.case, converted, images)
    assert torch.equal(rng, expected_rng), "a forward draws other random numbers"
    bound = GRADIENT_FACTOR * bound_for(dtype)
    assert largest_error(got, expected) <= bound
    assert relative_rms(converted_gradient, gradient) <= bound
    kept = list(counterparts(original, converted))
    for path, old, new in kept:
        for name, buffer in old.named_buffers(recurse=False):
            if buffer.is_floating_point():
                assert relative_rms(new.get_buffer(name), buffer) <= bound or not buffer.any(), f"{path}.{name}"
            else:
                assert torch.equal(new.get_buffer(name), buffer), f"{path}.{name}"
    gradients = {
        f"{path}.{name}": (parameter.grad, new.get_parameter(name).grad)
        for path, old, new in kept
        for name, parameter in old.named_parameters(recurse=False)
    }
    gradients |= _kernel_gradients(original, converted)
    assert_same_gradients(gradients, bound)


def _step(one: Case, model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """One forward and backward. Returns the outputs, the gradient of the images, and the random state afterwards."""
    torch.manual_seed(3)
    images = images.clone().requires_grad_()
    outputs = [output for output in tensors_of(one.run(model, images)) if output.requires_grad]
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    return [output.detach() for output in outputs], images.grad, state


def _kernel_gradients(original: nn.Module, converted: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Gradients of the kernels, laid out as tiles, and of the banks that took their place; and of biases."""
    gradients = {}
    for path, layer in shiftwise_layers(converted).items():
        site = original.get_submodule(path)
        for branch, source in zip(layer.branches, layer.match.branches, strict=True):
            if source.weight is not None:
                tiles, _ = lay_out(site.get_parameter(source.weight).grad, source.tile)
                gradients[f"{path}.{source.weight}"] = (tiles, branch.bank.grad)
            if source.bias is not None:
                gradients[f"{path}.{source.bias}"] = (site.get_parameter(source.bias).grad, branch.bias.grad)
    return gradients


def assert_same_gradients(gradients: dict[str, tuple[Tensor | None, Tensor | None]], bound: float) -> None:
    """Each to the bound times its size, at least the average: a bias before a BatchNorm has nothing but rounding."""
    given = {name: (old, new) for name, (old, new) in gradients.items() if old is not None}
    assert {name for name, (_, new) in gradients.items() if new is not None} == given.keys()
    assert given
    squares = sum(float(old.double().square().sum()) for old, _ in given.values())
    average = (squares / sum(old.numel() for old, _ in given.values())) ** 0.5
    for name, (old, new) in given.items():
        scale = max(float(old.double().norm()), average * old.numel() ** 0.5)
        assert float((new.double() - old.double()).norm()) <= bound * scale, name


@pytest.mark.parametrize(("one", "min_kernel"), NOTHING, ids=_ids(NOTHING))
def test_nothing_to_convert_is_an_error_that_changes_nothing(one: Case, min_kernel: int) -> None:
    model = one.model()
    before = snapshot(model)
    with pytest.raises(NoLargeKernelError, match="smaller than min_kernel = 7"):
        convert(model, SWConfig(min_kernel=min_kernel), inplace=True)
    assert_unchanged(model, before)


# ---- what is done to models, on some of each kind -------------------------------------------------------------------

SOME = [
    "timm convnext_atto",
    "timm mixnet_s",
    "timm fastvit_t8",
    "timm inception_next_atto",
    "timm coat_lite_tiny",
    "hf ConvNextForImageClassification drop_path_rate=0.1",
    "hf UperNet with ConvNeXt",
    "SLaK",
    "RepLKNet",
    "UniRepLKNet",
]
ALSO = ("timm coat_lite_tiny", "timm inception_next_atto", "RepLKNet")  # in the long tail


@pytest.fixture(scope="module", params=sample(SOME, [name for name in SOME if name not in ALSO]))
def some(request: pytest.FixtureRequest) -> Pair:
    return make_pair(case(request.param), 7)


def outputs(one: Case, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(one.run(model, one.images(one.small)))


def assert_equal_outputs(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_merge(some: Pair) -> None:
    merged = merge(some.converted)
    assert not shiftwise_layers(merged)
    assert len(shiftwise_layers(some.converted)) == some.case.layers[7]
    assert largest_error(outputs(some.case, merged), outputs(some.case, some.original)) <= some.bound
    state, original = merged.state_dict(), some.original.state_dict()
    plain = [
        path
        for path, layer in shiftwise_layers(some.converted).items()
        if len(layer.branches) == 1 and layer.branches[0].bn is None
    ]
    for path in plain:
        assert torch.equal(state[f"{path}.weight"], original[f"{path}.weight"]), path


def test_save_and_load(some: Pair, tmp_path) -> None:
    save(some.converted, tmp_path)
    base = some.case.build().eval()
    loaded = load(base, tmp_path)
    assert set(shiftwise_layers(loaded)) == set(shiftwise_layers(some.converted))
    expected = outputs(some.case, some.converted)
    assert_equal_outputs(outputs(some.case, loaded), expected)


def test_deepcopy(some: Pair) -> None:
    expected = outputs(some.case, some.converted)
    assert_equal_outputs(outputs(some.case, copy.deepcopy(some.converted)), expected)


def test_pickle(some: Pair, tmp_path) -> None:
    if "UperNet" in some.case.name:
        pytest.skip("transformers puts hooks that cannot be pickled into a backbone; nor can the original be")
    expected = outputs(some.case, some.converted)
    torch.save(some.converted, tmp_path / "model.pt")
    assert_equal_outputs(outputs(some.case, torch.load(tmp_path / "model.pt", weights_only=False)), expected)


def test_hooks_of_other_modules_fire(some: Pair) -> None:
    original = copy.deepcopy(some.original)
    sites = {m for path in shiftwise_layers(some.converted) for m in original.get_submodule(path).modules()}
    calls: list[str] = []
    for path, module in original.named_modules():
        if module not in sites and not any(site in sites for site in module.modules()):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    outputs(some.case, original)
    expected = list(calls)
    assert expected
    calls.clear()
    converted = convert(original)
    assert not calls, "the search called the model's hooks"
    outputs(some.case, converted)
    assert calls == expected


@pytest.mark.parametrize(
    "name",
    [
        "timm convnext_atto",
        "timm fastvit_t8",
        "SLaK",
        "hf FocalNetForImageClassification",
    ],
)
def test_gradient_checkpointing(name: str) -> None:
    pair = make_pair(case(name), 7)
    images = pair.case.images(pair.case.small, batch=2)
    original, converted = pair.original.train(), pair.converted.train()
    if hasattr(converted, "set_grad_checkpointing"):
        converted.set_grad_checkpointing(True)
    else:
        converted.gradient_checkpointing_enable()
    calls: list[str] = []
    for path, layer in shiftwise_layers(converted).items():
        layer.register_forward_hook(lambda *_, path=path: calls.append(path))
    expected, gradient, _ = _step(pair.case, original, images)
    got, converted_gradient, _ = _step(pair.case, converted, images)
    assert len(calls) > len(set(calls)), "no layer ran again in the backward pass: nothing was checkpointed"
    bound = GRADIENT_FACTOR * pair.bound
    assert largest_error(got, expected) <= bound
    assert relative_rms(converted_gradient, gradient) <= bound
    assert_same_gradients(_kernel_gradients(original, converted), bound)


REPARAMETERIZED = ["timm fastvit_t8", "timm fastvit_sa12", "UniRepLKNet", "RepLKNet"]


@pytest.mark.parametrize("name", sample(REPARAMETERIZED, [name for name in REPARAMETERIZED if "sa12" not in name]))
def test_timm_reparameterize(name: str) -> None:
    pair = make_pair(case(name), 7)
    expected = outputs(pair.case, pair.original)
    fused = reparameterize_model(pair.converted)
    assert all(branch.bn is None for layer in shiftwise_layers(fused).values() for branch in layer.branches)
    assert largest_error(outputs(pair.case, fused), expected) <= pair.bound
    assert largest_error(outputs(pair.case, pair.converted), expected) <= pair.bound


def test_timm_features() -> None:
    pair = make_pair(case("timm convnext_atto"), 7)
    images = pair.case.images(pair.case.small)
    with torch.no_grad():
        for name in ("forward_features", "forward_intermediates"):
            got, expected = (getattr(model, name)(images) for model in (pair.converted, pair.original))
            assert len(tensors_of(got)) == (1 if name == "forward_features" else 5)
            assert largest_error(got, expected) <= pair.bound


HF_CONVNEXT = "hf ConvNextForImageClassification drop_path_rate=0.1"


@pytest.mark.parametrize("name", [HF_CONVNEXT, "hf DINOv3ConvNextModel", "hf FocalNetForImageClassification"])
def test_hidden_states(name: str) -> None:
    pair = make_pair(case(name), 7)
    images = pair.case.images(pair.case.small)
    with torch.no_grad():
        got, expected = (
            pair.case.run(model, images, output_hidden_states=True) for model in (pair.converted, pair.original)
        )
    assert len(got.hidden_states) == len(expected.hidden_states) >= 5
    assert largest_error(got, expected) <= pair.bound


def test_save_pretrained(tmp_path) -> None:
    from safetensors.torch import load_file

    pair = make_pair(case(HF_CONVNEXT), 7)
    pair.converted.save_pretrained(tmp_path)
    written, state = load_file(tmp_path / "model.safetensors"), pair.original.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    loaded = type(pair.converted).from_pretrained(tmp_path)
    assert shiftwise_layers(loaded).keys() == shiftwise_layers(pair.converted).keys()
    assert_equal_outputs(outputs(pair.case, loaded), outputs(pair.case, pair.converted))


def test_initialisers_of_the_model_leave_the_tiles_alone() -> None:
    converted = make_pair(case(HF_CONVNEXT), 7).converted
    before = {path: layer.weight.clone() for path, layer in shiftwise_layers(converted).items()}
    classifier = converted.classifier.weight.clone()
    converted.apply(converted._init_weights)
    assert not torch.equal(converted.classifier.weight, classifier), "the initialiser did nothing"
    for path, layer in shiftwise_layers(converted).items():
        assert torch.equal(layer.weight, before[path]), path
