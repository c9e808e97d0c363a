"""The certificate: what it says is so, damage is noticed, and check finds what has changed."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sw_transplant as sw
from sw_transplant.check import certify
from sw_transplant.check.certificate import (
    CERTIFICATE_NAME,
    Certificate,
    hash_file,
    hash_tensors,
    hash_weights,
)
from sw_transplant.check.recheck import check_folder
from sw_transplant.check.rounding import measure_layers
from sw_transplant.cli import main
from sw_transplant.forms import FORMS
from tests.small_models import Parallel, conv_bn


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 9, padding=4, groups=4), Parallel(conv_bn(), conv_bn(size=5)), nn.ReLU()
    )
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 16, 16))
    return model.eval()


@pytest.fixture
def certified(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model, and the folder with its conversion and the certificate."""
    original, config = network(), sw.SWConfig(tile=3)
    converted = sw.convert(original, config)
    sw.save(converted, tmp_path / "converted")
    file = tmp_path / "converted" / CERTIFICATE_NAME
    sw.verify(original, converted, input_size=16, batch_size=2, certificate=file, config=config)
    return original, file.parent


def failed(report) -> list[str]:
    return [finding.what for finding in report.findings if finding.ok is False]


# ---- what it says


def test_what_it_says(certified: tuple[nn.Module, Path]) -> None:
    original, folder = certified
    values = Certificate.read(folder / CERTIFICATE_NAME).values
    assert values["ok"] is True
    assert values["config"] == sw.SWConfig(tile=3).to_dict()
    assert values["versions"]["torch"] == torch.__version__
    assert values["weights"] == {
        "original": hash_weights(original),
        "converted": hash_weights(sw.load(original, folder)),
    }
    assert values["files"] == {n: hash_file(folder / n) for n in ("model.safetensors", "sw_config.json")}
    assert values["run"] | {"device": "cpu", "dtype": "float32", "deterministic": False} == values["run"]
    assert values["inputs"]["images"] == 4
    assert values["inputs"]["shape"] == [2, 3, 16, 16]
    assert values["comparison"]["ok"] is True
    first, second = values["layers"]
    assert (first["path"], first["replaced"], first["kernels"], first["tiles"]) == ("1", "Conv2d", [[9, 9]], [[9, 3]])
    assert (first["ran"], first["dtype"], first["shape"]) == ("assembled", "float32", [2, 4, 16, 16])
    assert (first["terms"], first["bound"]) == (82, 82 * 2.0**-24)
    assert (second["replaced"], second["terms"]) == ("Parallel", 49 + 25 + 2 * 8)
    assert 0 < first["largest_error"] < first["bound"]


def test_images_are_named_by_their_hash(tmp_path: Path) -> None:
    original = network()
    images = torch.randn(3, 3, 12, 12)
    sw.verify(original, sw.convert(original), images, batch_size=2, certificate=tmp_path / "c.json")
    values = Certificate.read(tmp_path / "c.json").values
    assert values["inputs"]["kind"] == "images"
    assert values["inputs"]["batches"] == [hash_tensors([part]) for part in images.split(2)]
    assert (values["files"], values["config"]) == ({}, None)


def test_a_failed_comparison_is_certified_as_such(tmp_path: Path) -> None:
    original = network()
    converted = sw.convert(original)
    with torch.no_grad():
        converted[1].branches[0].bank[0, 0, 0, 0] += 1
    report = sw.verify(original, converted, input_size=16, certificate=tmp_path / "c.json")
    assert not report.ok
    assert not Certificate.read(tmp_path / "c.json").ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_form_is_within_the_proven_bound(dtype: torch.dtype) -> None:
    original = network().to(dtype)
    x = torch.randn(2, 3, 14, 14).to(dtype)
    for form in FORMS:
        layers = measure_layers(sw.convert(original, sw.SWConfig(form=form)), lambda model: model(x))
        assert [layer.path for layer in layers] == ["1", "2"]
        assert all((layer.ok and layer.ran == form) or layer.ran == "assembled" for layer in layers)
        assert all(layer.ok for layer in layers), layers


def test_a_layer_that_computes_something_else_is_beyond_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = sw.convert(network())
    converted[1].register_forward_hook(lambda module, given, output: output * (1 + 1e-4))
    first, second = measure_layers(converted, lambda model: model(torch.randn(1, 3, 14, 14)))
    assert not first.ok
    assert second.ok
    assert len(converted[1]._forward_hooks) == 1


def test_the_papers_module_has_no_bound() -> None:
    converted = sw.convert(network(), sw.SWConfig(mode="shiftwise"), select="1")
    (layer,) = measure_layers(converted, lambda model: model(torch.randn(1, 3, 14, 14)))
    assert (layer.bound, layer.largest_error, layer.ok) == (None, None, True)


# ---- hashes


def test_hashes_see_names_dtypes_shapes_and_values() -> None:
    model = nn.Linear(2, 2)
    hashes = {hash_weights(model)}
    assert hash_weights(copy.deepcopy(model)) in hashes
    with torch.no_grad():
        model.weight[0, 0] = -model.weight[0, 0]
    hashes |= {hash_weights(model), hash_weights(nn.Sequential(model)), hash_weights(copy.deepcopy(model).double())}
    assert len(hashes) == 4


# ---- reading


def test_damage_and_edits_are_noticed(certified: tuple[nn.Module, Path]) -> None:
    file = certified[1] / CERTIFICATE_NAME
    text = file.read_text()
    for other, message in (
        (text[:-20], "damaged, or no certificate"),
        (text.replace('"ok": true', '"ok": false', 1), "changed since it was written"),
        (text.replace('"version": 1,', '"version": 2,'), "reads up to 1; upgrade it"),
        (text.replace('"version": 1,', '"version": true,'), "expected an integer"),
        (text.replace('"layers"', '"layer"'), "'layers' is absent"),
        (text.replace('"original": "', '"originals": "'), "has no hash 'original'"),
        ("[" * 100_000, "damaged, or no certificate"),
        ("[]", "no certificate"),
        ("{}", "no certificate"),
    ):
        file.write_text(other)
        with pytest.raises(ValueError, match=message):
            Certificate.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="damaged"):
        Certificate.read(file)
    with pytest.raises(ValueError, match="no such file"):
        Certificate.read(file.with_name("none.json"))


# ---- check


def test_check_of_what_is_as_certified(certified: tuple[nn.Module, Path]) -> None:
    original, folder = certified
    assert failed(check_folder(folder)) == []
    report = check_folder(folder, original)
    assert failed(report) == []
    assert [finding.what for finding in report.findings if finding.ok is None] == []
    assert "weights of the original model" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_check_finds_changed_files(certified: tuple[nn.Module, Path]) -> None:
    original, folder = certified
    file = folder / "model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("bank")).view(-1)[0] += 1
    save_file(tensors, file)
    assert failed(check_folder(folder)) == ["model.safetensors"]
    found = failed(check_folder(folder, original))
    assert found == ["model.safetensors", "weights of the converted model", "the comparison, again"]
    file.write_bytes(file.read_bytes()[:-1])
    assert failed(check_folder(folder, original)) == ["model.safetensors", "loading it"]
    file.unlink()
    assert failed(check_folder(folder)) == ["model.safetensors"]


def test_check_finds_another_original(certified: tuple[nn.Module, Path]) -> None:
    original, folder = certified
    other = copy.deepcopy(original)
    with torch.no_grad():
        other[0].weight.mul_(2)
    assert failed(check_folder(folder, other)) == ["weights of the original model", "the comparison, again"]


def test_check_looks_at_no_file_outside(certified: tuple[nn.Module, Path]) -> None:
    _, folder = certified
    certificate = Certificate.read(folder / CERTIFICATE_NAME)
    (folder.parent / "secret").write_text("x")
    from sw_transplant.check.certificate import _sealed

    values = _sealed({**certificate.values, "files": {"../secret": hash_file(folder.parent / "secret")}})
    (folder / CERTIFICATE_NAME).write_text(json.dumps(values))
    assert failed(check_folder(folder)) == ["../secret"]


# ---- in one call


def test_certify_for_the_command_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    original, folder = network(), tmp_path / "converted"
    config = sw.SWConfig(tile=3)
    converted = sw.convert(original, config)
    sw.save(converted, folder)
    certificate = certify(original, converted, folder, input_size=12, config=config)
    assert certificate.ok
    assert certificate.values["config"] == config.to_dict()
    assert certificate.values["inputs"]["shape"] == [4, 3, 12, 12]
    assert Certificate.read(folder / CERTIFICATE_NAME) == certificate
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    words = ["check", str(folder), "--model", "tests.check.test_certificate:network"]
    assert main(words) == 0
    assert "the comparison, again" in capsys.readouterr().out
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    assert main(words) == 1
    assert "changed since it was certified" in capsys.readouterr().out


def test_certify_of_a_model_that_was_converted_in_place(tmp_path: Path) -> None:
    model = sw.convert(network(), inplace=True)
    with pytest.raises(ValueError, match=r"the original has Shiftwise layers, .*restore\(copy\.deepcopy\(model\)\)"):
        certify(model, model, tmp_path / "c.json")
    original = sw.restore(copy.deepcopy(model))
    with pytest.raises(ValueError, match="the converted model has no Shiftwise layer"):
        certify(original, original, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()
    images = torch.randn(3, 3, 12, 12)
    certificate = certify(original, model, tmp_path / "c.json", images, batch_size=2, seed=1)
    assert certificate.ok
    assert certificate.values["inputs"]["images"] == 3
    with torch.no_grad():
        model[1].branches[0].bank.mul_(1.1)
    assert not certify(original, model, tmp_path / "c.json", images).ok
