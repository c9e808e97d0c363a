"""Save and load: a strict round trip, and a clear error for every file that is not what it should be."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d, SWConfig, convert, load, save
from tests.small_models import conv, model_of_everything
from tests.snapshots import assert_unchanged, snapshot


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    torch.manual_seed(1)
    converted = convert(model_of_everything().eval(), SWConfig(form="shift"))
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # as after fine-tuning
    save(converted, folder)
    return converted, folder


@pytest.fixture
def saved(written, tmp_path):
    """A converted model, to be read only, and a folder of its own with what it was saved as."""
    converted, folder = written
    return converted, Path(shutil.copytree(folder, tmp_path / "folder"))


def test_round_trip(saved):
    converted, folder = saved
    base = model_of_everything()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    before = snapshot(base)
    loaded = load(base, folder).eval()
    assert_unchanged(base, before)
    state, expected = loaded.state_dict(), converted.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [m.form for m in loaded.modules() if isinstance(m, ShiftwiseConv2d)] == ["shift"] * 6
    x = torch.randn(2, 4, 21, 18, dtype=torch.float64)
    assert torch.equal(loaded(x), converted(x))
    assert loaded[2].inner is loaded[4].inner[0]


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    _converted, folder = saved
    save(load(model_of_everything(), folder), tmp_path / "again")
    for name in ("sw_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_only_json_and_safetensors_are_written(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "sw_config.json"]


def test_in_place_and_on_the_meta_device(saved):
    converted, folder = saved
    base = model_of_everything()
    assert load(base, folder, inplace=True) is base
    meta = model_of_everything().to("meta")
    loaded = load(meta, folder).eval()
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    assert torch.equal(loaded(x), converted(x))


def test_a_part_that_moved_is_saved_where_it_is_now(saved, tmp_path):
    converted, _ = saved
    detector = nn.ModuleDict({"backbone": converted, "head": nn.ReLU()})
    save(detector, tmp_path / "detector")
    loaded = load(nn.ModuleDict({"backbone": model_of_everything(), "head": nn.ReLU()}), tmp_path / "detector")
    assert isinstance(loaded["backbone"][0].inner, ShiftwiseConv2d)


def test_the_model_itself_may_be_the_layer(tmp_path):
    converted = convert(conv())
    save(converted, tmp_path)
    loaded = load(conv(), tmp_path)
    assert torch.equal(loaded.weight, converted.weight)


# ---- files and models that do not fit ----


def edit(folder, change):
    path = folder / "sw_config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


FILES = {
    "newer version": (
        lambda f: edit(f, lambda d: d.update(version=99)),
        "version 99, this sw_transplant reads up to 1",
    ),
    "no version": (lambda f: edit(f, lambda d: d.pop("version")), "damaged, or not written by"),
    "no layers": (lambda f: edit(f, lambda d: d.pop("layers")), "damaged, or not written by"),
    "layer damaged": (
        lambda f: edit(f, lambda d: d["layers"][0].pop("branches")),
        "not the description of a converted",
    ),
    "layer unknown field": (
        lambda f: edit(f, lambda d: d["layers"][0].update(colour=4)),
        "not the description of a conv",
    ),
    "unknown form": (lambda f: edit(f, lambda d: d["layers"][0].update(form="warp")), "form: got 'warp'"),
    "config truncated": (lambda f: truncate(f / "sw_config.json", 100), "damaged, or not written by"),
    "config absent": (lambda f: (f / "sw_config.json").unlink(), "no such file, expected the folder"),
    "weights truncated": (lambda f: truncate(f / "model.safetensors", -50), "truncated or damaged"),
    "weights cut in the header": (lambda f: truncate(f / "model.safetensors", 20), "truncated or damaged"),
    "weights absent": (lambda f: (f / "model.safetensors").unlink(), "no such file, expected the folder"),
    "missing key": (lambda f: rewrite(f, lambda t: t.pop("3.weight")), r"1 missing \(3.weight\)"),
    "unexpected key": (lambda f: rewrite(f, lambda t: t.update(more=torch.ones(1))), r"1 unexpected \(more\)"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({"3.weight": t["3.weight"][:2]})),
        r"3.weight: .*\(2,\).*\(4,\)",
    ),
    "wrong dtype": (
        lambda f: rewrite(f, lambda t: t.update({"3.weight": t["3.weight"].half()})),
        "torch.float16 .*float64",
    ),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_not_right_is_refused_and_the_model_left_alone(saved, case, inplace):
    _, folder = saved
    damage, message = FILES[case]
    damage(folder)
    base = model_of_everything()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        load(base, folder, inplace=inplace)
    assert_unchanged(base, before)


MODELS = {
    "layer absent": (lambda m: m[:5], "has no such layer"),
    "another kernel": (
        lambda m: (setattr(m[0], "inner", conv(size=9).double()), m)[1],
        r"shape \(4, 1, 9, 9\), expected",
    ),
    "another head": (lambda m: (m.append(nn.Linear(3, 3)), m)[1], "2 missing"),
    "another dtype": (lambda m: m.float(), "float64 .* in the file, torch.float32"),
    "converted already": (lambda m: convert(m), "is converted already"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_does_not_fit_is_refused_and_left_alone(saved, case):
    _, folder = saved
    change, message = MODELS[case]
    base = change(copy.deepcopy(model_of_everything()))
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        load(base, folder, inplace=True)
    assert_unchanged(base, before)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"no Shiftwise layer, expected a model from convert"):
        save(nn.Sequential(conv()), tmp_path / "plain")
    converted = convert(nn.Sequential(conv()))
    converted[0].reparameterize()
    with pytest.raises(ValueError, match=r"0: this Shiftwise layer cannot be rebuilt"):
        save(converted, tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []
