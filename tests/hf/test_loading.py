"""Ways in and out of a folder: conversion on the fly, shards, dtypes, devices, parts, save and load, and refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import validate_quantization_for_training

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, load, merge, restore, save, set_form
from sw_transplant.hf import ShiftwiseConfig, ShiftwiseQuantizer, attach
from sw_transplant.layers.sw_conv2d import SWConv2d
from tests.acceptance import shiftwise_layers, tensors_of
from tests.hf.models import MODELS
from tests.sampling import sample
from tests.snapshots import assert_unchanged, snapshot

KINDS = {"dense": SWConfig(), "edges": SWConfig(edges=2)}
CONVNEXT = transformers.ConvNextForImageClassification


def model(name: str = "ConvNext") -> Any:
    return MODELS[name].model()


def converted(kind: str = "dense", name: str = "ConvNext") -> Any:
    one = convert(model(name), KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for layer in shiftwise_layers(one).values():
        for branch in layer.branches:
            if branch.gain is not None:
                branch.gain.data.uniform_(0.5, 1, generator=generator)
    return one


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """Also of what is not saved, but follows from it."""
    states = [{**model.state_dict(), **dict(model.named_buffers())} for model in (one, other)]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def original(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "original")
    return tmp_path / "original"


# ---- what a converted model knows ----


def test_a_converted_model_describes_itself() -> None:
    one = converted()
    settings = one.config.quantization_config
    assert isinstance(one.hf_quantizer, ShiftwiseQuantizer)
    assert isinstance(settings, ShiftwiseConfig)
    assert [layer.match.path for layer in settings.layers] == list(shiftwise_layers(one))
    assert (settings.weights, converted("edges").config.quantization_config.weights) == ("dense", "banks")
    assert one.hf_quantizer.is_serializable()
    assert one.hf_quantizer.is_trainable
    assert one.hf_quantizer.is_qat_trainable
    validate_quantization_for_training(one)
    assert ShiftwiseConfig.from_dict(json.loads(settings.to_json_string())) == settings
    assert copy.deepcopy(settings) == settings != converted("edges").config.quantization_config


def test_the_original_knows_nothing_of_it() -> None:
    plain = model()
    convert(plain)
    assert not hasattr(plain, "hf_quantizer")
    assert not hasattr(plain.config, "quantization_config")


def test_a_loaded_model_is_no_quantized_one(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    loaded = CONVNEXT.from_pretrained(tmp_path)
    validate_quantization_for_training(loaded)
    assert loaded.half().dtype is torch.float16
    assert loaded.float().dtype is torch.float32
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_loaded_models_are_the_same_again(kind: str, tmp_path: Path) -> None:
    one = converted(kind)
    set_form(one, "shift", select="*stages.1*")
    one.save_pretrained(tmp_path / "first")
    loaded = CONVNEXT.from_pretrained(tmp_path / "first")
    assert [layer.form for layer in shiftwise_layers(loaded).values()] == ["auto", "shift", "auto", "auto"]
    loaded.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


# ---- on the fly, and back ----


def test_a_plain_folder_is_converted_on_the_fly(original: Path, tmp_path: Path) -> None:
    settings = ShiftwiseConfig(SWConfig(tile=3, form="shift"), select=["*stages.[13]*"])
    loaded = transformers.AutoModelForImageClassification.from_pretrained(original, quantization_config=settings)
    expected = convert(model(), SWConfig(tile=3, form="shift"), select=["*stages.[13]*"])
    assert len(shiftwise_layers(loaded)) == 2
    assert_same_state(loaded, expected)
    loaded.save_pretrained(tmp_path / "converted")
    assert_same_state(CONVNEXT.from_pretrained(tmp_path / "converted"), expected)
    as_dict = CONVNEXT.from_pretrained(original, quantization_config=settings.to_dict())
    assert_same_state(as_dict, expected)


def test_the_configuration_of_a_converted_model_may_be_given(original: Path) -> None:
    assert_same_state(CONVNEXT.from_pretrained(original, config=converted().config), converted())


def test_the_papers_module_on_the_fly(original: Path, tmp_path: Path) -> None:
    settings = ShiftwiseConfig(SWConfig(mode="shiftwise"))
    loaded = CONVNEXT.from_pretrained(original, quantization_config=settings)
    assert all(isinstance(layer, SWConv2d) for layer in shiftwise_layers(loaded).values())
    loaded.save_pretrained(tmp_path / "converted")
    assert_same_state(CONVNEXT.from_pretrained(tmp_path / "converted"), loaded)


def test_dequantize_merges(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    loaded = CONVNEXT.from_pretrained(tmp_path)
    plain = loaded.dequantize()
    assert plain is loaded
    assert_same_state(plain, model())
    assert not hasattr(plain, "hf_quantizer")
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in config_of(tmp_path / "plain")
    assert not shiftwise_layers(CONVNEXT.from_pretrained(tmp_path / "plain"))


@pytest.mark.parametrize("back", [merge, restore])
def test_a_plain_model_is_saved_as_one(back: Any, tmp_path: Path) -> None:
    one = converted()
    one.save_pretrained(tmp_path / "converted")
    back(one).save_pretrained(tmp_path / "plain")
    model().save_pretrained(tmp_path / "original")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "original" / name).read_bytes()
    assert shiftwise_layers(one)
    assert one.config.quantization_config.weights == "dense"


# ---- shards, dtypes, devices ----


@pytest.mark.parametrize("kind", sample(KINDS, ["edges"]))
def test_shards(kind: str, tmp_path: Path) -> None:
    one = converted(kind)
    one.save_pretrained(tmp_path, max_shard_size="25KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_state(CONVNEXT.from_pretrained(tmp_path), one)
    other = converted(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    transformers.trainer.load_sharded_checkpoint(other, tmp_path, strict=False)  # as Trainer resumes
    assert_same_state(other, one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    one = converted(kind)
    one.save_pretrained(tmp_path)
    loaded = CONVNEXT.from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_state(loaded, one.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"convnext": "cpu", "classifier": "cpu"}], ids=str)
def test_device_maps(kind: str, device_map: Any, tmp_path: Path) -> None:
    one = converted(kind)
    one.save_pretrained(tmp_path)
    loaded = CONVNEXT.from_pretrained(tmp_path, device_map=device_map)
    assert_same_state(loaded, one)
    for layer in shiftwise_layers(loaded).values():
        for branch in layer.branches:
            assert branch.index.device.type == "cpu"


def test_what_is_not_in_memory_is_refused(tmp_path: Path) -> None:
    converted().save_pretrained(tmp_path)
    for places in ({"convnext": "cpu", "classifier": "disk"}, {"convnext": 0, "classifier": "cpu"}):
        with pytest.raises(ValueError, match=r"device_map: .* offloads layers, which Shiftwise layers do not support"):
            CONVNEXT.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    for take_away in (lambda layer: layer.to("meta"), lambda layer: setattr(layer.branches[0].bank, "ds_id", 1)):
        one = converted()
        take_away(shiftwise_layers(one)["convnext.encoder.stages.1.layers.0.dwconv"])
        with pytest.raises(NotImplementedError, match=r"stages\.1\.layers\.0\.dwconv: its weights are not whole"):
            one.save_pretrained(tmp_path / "no")
        assert not (tmp_path / "no" / "model.safetensors").exists()


def test_hooks_of_a_device_map_stay_with_the_layer(tmp_path: Path) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    converted().save_pretrained(tmp_path)
    plain = model()
    site = plain.convnext.encoder.stages[2].layers[0].dwconv
    hook = add_hook_to_module(site, AlignDevicesHook(execution_device="cpu", io_same_device=True))._hf_hook
    settings = ShiftwiseConfig.from_dict(config_of(tmp_path)["quantization_config"])
    plain.quantization_method = plain.is_quantized = "as transformers leaves it"
    ShiftwiseQuantizer(settings, pre_quantized=True)._process_model_after_weight_loading(plain)
    layer = plain.convnext.encoder.stages[2].layers[0].dwconv
    assert isinstance(layer, ShiftwiseConv2d)
    assert layer._hf_hook is hook
    images = MODELS["ConvNext"].images()
    with torch.no_grad():
        assert torch.equal(plain(images).logits, converted()(images).logits)


def test_edges_are_those_of_the_file(tmp_path: Path) -> None:
    """And not those that a conversion would draw."""
    one = convert(model())
    for layer in shiftwise_layers(one).values():
        layer.branches[0] = layer.branches[0].with_edges(2, seed=77)
        layer.match = replace(layer.match, edges=2)
        layer.branches[0].gain.data.fill_(0.5)
    images = MODELS["ConvNext"].images()
    with torch.no_grad():
        expected = one(images).logits
    one.save_pretrained(tmp_path)
    loaded = CONVNEXT.from_pretrained(tmp_path)
    assert_same_state(loaded, one)
    for layer, other in zip(shiftwise_layers(loaded).values(), shiftwise_layers(one).values(), strict=True):
        assert torch.equal(layer.branches[0].index, other.branches[0].index)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, expected)


# ---- parts ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_may_be_saved_on_its_own(kind: str, tmp_path: Path) -> None:
    whole = converted(kind, "UperNet")
    whole.backbone.save_pretrained(tmp_path / "backbone")
    loaded = transformers.ConvNextBackbone.from_pretrained(tmp_path / "backbone")
    assert_same_state(loaded, whole.backbone)
    whole.save_pretrained(tmp_path / "whole")  # and leaves nothing behind in the whole
    assert "quantization_config" not in config_of(tmp_path / "whole")["backbone_config"]
    assert_same_state(type(whole).from_pretrained(tmp_path / "whole"), whole)
    one = converted(kind)
    one.convnext.save_pretrained(tmp_path / "base")  # shares its configuration with the whole
    assert_same_state(transformers.AutoModel.from_pretrained(tmp_path / "base"), one.convnext)
    one.save_pretrained(tmp_path / "classifier")
    assert_same_state(CONVNEXT.from_pretrained(tmp_path / "classifier"), one)


def test_a_base_models_folder_fits_into_a_classifier(tmp_path: Path) -> None:
    for kind in KINDS:
        one = converted(kind)
        one.convnext.save_pretrained(tmp_path / kind)
        loaded = CONVNEXT.from_pretrained(tmp_path / kind)
        assert_same_state(loaded.convnext, one.convnext)


def test_a_model_around_the_model(tmp_path: Path) -> None:
    wrapped = convert(nn.ModuleDict({"inner": model(), "head": nn.ReLU()}))
    wrapped["inner"].save_pretrained(tmp_path)
    assert_same_state(CONVNEXT.from_pretrained(tmp_path), wrapped["inner"])


def test_attach_tells_the_whole_of_a_part_that_was_converted(tmp_path: Path) -> None:
    whole = model("UperNet")
    whole.backbone = convert(whole.backbone)
    attach(whole)
    whole.save_pretrained(tmp_path)
    assert_same_state(type(whole).from_pretrained(tmp_path), whole)


# ---- save and load ----


@pytest.mark.parametrize(
    ("kind", "name"), [("dense", "ConvNext"), ("edges", "DINOv3"), ("dense", "TimmWrapper"), ("edges", "UperNet")]
)
def test_save_and_load_share_the_folders(kind: str, name: str, tmp_path: Path, capfd: Any) -> None:
    one = converted(kind, name)
    capfd.readouterr()
    save(one, tmp_path / "saved")
    assert_same_state(type(one).from_pretrained(tmp_path / "saved"), one)
    one.save_pretrained(tmp_path / "pretrained")
    base = MODELS[name].build()
    before = snapshot(base)
    capfd.readouterr()
    loaded = load(base, tmp_path / "pretrained")
    assert capfd.readouterr().err == ""
    assert_unchanged(base, before)
    assert_same_state(loaded, one)
    assert load(base, tmp_path / "saved", inplace=True) is base
    assert_same_state(base, one)
    base.save_pretrained(tmp_path / "again")
    assert_same_state(type(one).from_pretrained(tmp_path / "again"), one)


def test_load_onto_the_meta_device(tmp_path: Path) -> None:
    one = converted("edges")
    save(one, tmp_path)
    loaded = load(model().to("meta"), tmp_path).eval()
    images = MODELS["ConvNext"].images()
    with torch.no_grad():
        torch.testing.assert_close(tensors_of(loaded(images)), tensors_of(one(images)))


def test_folders_in_the_format_of_other_models_are_still_read(tmp_path: Path) -> None:
    one = converted()
    wrapped = nn.ModuleDict({"inner": one})  # no model of transformers: the format of save
    save(wrapped, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "sw_config.json"]
    assert_same_state(load(nn.ModuleDict({"inner": model()}), tmp_path), wrapped)


def other_classes() -> Any:
    return CONVNEXT(transformers.ConvNextConfig(num_labels=7, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]))


UNFIT = {
    "another class": (lambda: model().convnext, lambda folder: None, "unexpected_keys.*classifier"),
    "other outputs": (other_classes, lambda folder: None, r"classifier.*\(5, 32\).*in the file.*\(7, 32\)"),
    "another dtype": (lambda: model().double(), lambda folder: None, "float32 .*in the file.*float64"),
    "weights cut": (model, lambda folder: cut(folder / "model.safetensors"), "cannot be read as ConvNextForImageCl"),
    "a weight missing": (model, lambda folder: drop(folder, "classifier.bias"), "missing_keys.*classifier.bias"),
    "newer version": (model, lambda folder: edit(folder, version=99), "version 99, this sw_transplant reads up to"),
    "unknown field": (model, lambda folder: edit(folder, colour=1), "not written by this package"),
    "layers damaged": (model, lambda folder: edit(folder, layers=[{"form": "auto"}]), "not the description of a conv"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, **changes: Any) -> None:
    config = config_of(folder)
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", UNFIT)
def test_a_folder_that_does_not_fit_is_refused_and_the_model_left_alone(case: str, tmp_path: Path) -> None:
    build, damage, message = UNFIT[case]
    save(converted(), tmp_path)
    damage(tmp_path)
    base = build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        load(base, tmp_path, inplace=True)
    assert_unchanged(base, before)


# ---- what must not happen in silence ----


def test_weights_that_the_description_promises_must_be_there(tmp_path: Path) -> None:
    one = converted("edges")
    one.save_pretrained(tmp_path / "converted")
    CONVNEXT(one.config).save_pretrained(tmp_path / "plain")  # a plain model, with the configuration of the other
    with pytest.raises(ValueError, match=r"stages\.0\.layers\.0\.dwconv: .*not in the file with the weights"):
        CONVNEXT.from_pretrained(tmp_path / "plain")


def reparameterized() -> Any:
    one = converted()
    shiftwise_layers(one)["convnext.encoder.stages.0.layers.0.dwconv"].reparameterize()
    return one


UNSAVABLE = {
    "reparameterized": (reparameterized, r"stages\.0\.layers\.0\.dwconv: merged into"),
    "merged edges": (
        lambda: merge(converted("edges")),
        "merged into convolutions with other names or shapes than",
    ),
    "merged modules": (
        lambda: merge(convert(model(), SWConfig(mode="shiftwise"))),
        "merged into convolutions with other names or shapes than those of ConvNextForImageClassification",
    ),
    "merged, converted again": (
        lambda: convert(merge(converted("edges"))),
        "merged into convolutions",
    ),
    "merged part": (
        lambda: merge(converted("edges")).convnext,
        "merged into convolutions .* of ConvNextModel",
    ),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_could_not_be_read_again_is_not_written(case: str, tmp_path: Path) -> None:
    make, message = UNSAVABLE[case]
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_quantized_otherwise_is_left_alone() -> None:
    plain = model()
    plain.hf_quantizer = transformers.quantizers.HfQuantizer.__new__(_Other)
    before = snapshot(plain)
    with pytest.raises(ValueError, match="quantized with other, whose folders cannot hold Shiftwise layers"):
        convert(plain, inplace=True)
    assert_unchanged(plain, before)


class _Other(transformers.quantizers.HfQuantizer):
    quantization_config = type("Config", (), {"quant_method": "other"})()

    def is_serializable(self) -> bool:
        return True

    is_trainable = False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": 2}, "version 2, this sw_transplant reads up to 1"),
        ({"weights": "sparse"}, "weights 'sparse', expected one of"),
        ({"select": lambda path, module: True}, "select is a function, expected glob patterns"),
        ({"config": {"tiles": 3}}, "unknown fields"),
        ({"config": SWConfig, "layers": []}, "got type, expected an object"),
    ],
)
def test_configurations_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftwiseConfig(**arguments)
