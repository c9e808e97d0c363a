"""The command line: every kind of model, every exit code, and what goes to stdout and what to stderr."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sw_transplant as sw
from sw_transplant import interrupts
from sw_transplant.cli import main
from sw_transplant.cli.load_model import InputError, load_model
from sw_transplant.cli.results import Result
from sw_transplant.cuda import storage
from sw_transplant.cuda.sources import Factory, Job

ROOT = Path(__file__).resolve().parents[2]

TINY = """
from torch import nn

def build():
    print("this is no result")
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 9, padding=4, groups=8), nn.Conv2d(8, 8, 9, padding=4, groups=8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )

class Builders:
    tiny = staticmethod(build)

def small_kernels():
    return nn.Sequential(nn.Conv2d(3, 3, 5, groups=3))

def only_tied():
    model = build()
    model[2].weight = model[1].weight
    return model

def interrupted():
    raise KeyboardInterrupt

def broken():
    raise ValueError("the model's own error")

def other():
    return "a string"

def needs(argument):
    return build()

def waits():
    import time
    try:
        print("waiting", flush=True)
        time.sleep(60)
    finally:
        open("tidied_up", "w").close()

def embedding():
    return nn.Sequential(*list(build())[:-1])

def enlarges():
    return nn.Sequential(nn.Conv2d(3, 3, 9, padding=4, groups=3), nn.Upsample(scale_factor=2))

model = build()
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory with the module `tiny_model` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tiny_model.py").write_text(TINY)
    for name in ("weights.pth", "weights.safetensors", "model.onnx"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("cat\ncat\n")
    (tmp_path / "broken_module.py").write_text("import no_such_dependency\n")
    yield tmp_path
    sys.modules.pop("tiny_model", None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself has printed
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def start(*words: object, **settings) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sw_transplant", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **settings
    )


def save_npz(path: Path, **arrays: np.ndarray) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(path, **{"images": images, "labels": np.arange(12) % 5, **arrays})
    return path


def save_class_folders(path: Path, classes: int = 5) -> Path:
    generator = np.random.default_rng(0)
    for index in range(2 * classes):
        place = path / f"class{index % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return path


def save_hugging_face(path: Path, kind: str = "ConvNextForImageClassification") -> Path:
    import transformers

    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 12, 12], depths=[1, 1, 1, 1], num_labels=5, layer_scale_init_value=1.0, image_size=32
    )
    getattr(transformers, kind)(config).save_pretrained(path)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


# ---- kinds of models ----


def test_cache_shows_and_removes_kernels(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(*words: str) -> dict:
        code, out, _ = run("cache", "--json", *words)
        assert code == 0
        return json.loads(out)

    monkeypatch.setenv("SW_TRANSPLANT_CACHE", str(folder / "kernels"))
    assert cache() == {"folder": str(folder / "kernels"), "kernels": []}
    job = Job(Factory("somewhere", "some_source"), ("float16",), (9, 0))
    storage.write(job, storage.Cubin("entry", "p", bytes(2048)))
    (kernel,) = cache()["kernels"]
    assert (kernel["kernel"], kernel["architecture"], kernel["whole"]) == ("some: float16", "sm_90", True)
    assert "1 kernels" in run("cache")[1]
    (path,) = (folder / "kernels").iterdir()
    path.write_bytes(b"damaged")
    assert "(damaged)" in run("cache")[1]
    assert cache("--clear")["removed"] == 1
    assert cache()["kernels"] == []
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", "")
    assert "SW_TRANSPLANT_CACHE is empty" in run("cache")[1]


def test_inspect_prints_the_inspection(run) -> None:
    code, out, _ = run("inspect", "tiny_model:build")
    model = load_model("tiny_model:build").model
    assert (code, out) == (0, f"{sw.inspect_model(model)}\n")


def test_inspect_takes_the_search_options(run) -> None:
    code, out, _ = run("inspect", "tiny_model:build", "--select", "1", "--tile", 3, "--min-kernel", 9, "--json")
    found = json.loads(out)
    assert code == 0
    assert [match["path"] for match in found["matches"]] == ["1"]
    assert found["matches"][0]["branches"][0]["tile"] == 3
    assert [(skipped["path"], skipped["reason"]) for skipped in found["skipped"]] == [("2", "left out by select")]


def test_select_can_be_repeated(run) -> None:
    _, out, _ = run("inspect", "tiny_model:build", "--select", "1", "--select", "[2-5]", "--json")
    assert [match["path"] for match in json.loads(out)["matches"]] == ["1", "2"]


def test_inspect_of_nothing_to_convert_is_fine(run) -> None:
    code, out, _ = run("inspect", "tiny_model:small_kernels")
    assert code == 0
    assert "No large depthwise convolution" in out


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_atto.d2_in1k"])
def test_timm_name(run, name: str) -> None:
    code, out, err = run("inspect", name, "--json")
    assert (code, err.count("note")) == (0, 0)
    assert len(json.loads(out)["matches"]) == 12


def test_networks_of_the_project_are_timm_names(run) -> None:
    code, out, _ = run("inspect", "unireplknet_a", "--json")
    assert code == 0
    assert {match["type_name"] for match in json.loads(out)["matches"]} == {"DilatedReparamBlock"}


def test_dotted_callable(run) -> None:
    assert run("inspect", "tiny_model:Builders.tiny")[0] == 0


def test_timm_name_wins_over_a_folder_of_that_name(run, folder: Path) -> None:
    save_hugging_face(folder / "convnext_atto")
    _, word, err = run("convert", "convnext_atto", "--json", "-o", "converted")
    _, path, _ = run("inspect", "./convnext_atto", "--json")
    assert len(json.loads(word)["layers"]) == 12
    assert "the folder is ./convnext_atto" in err
    assert len(json.loads(path)["matches"]) == 4


def test_word_that_timm_does_not_know_is_a_folder(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hugging_face(folder / "mine")
    assert run("inspect", "mine")[0] == 0
    without(monkeypatch, "timm")
    assert run("inspect", "mine")[0] == 0


def test_colon_in_the_name_of_a_folder(run, folder: Path) -> None:
    save_hugging_face(folder / "tiny_model:build")
    code, out, _ = run("inspect", "tiny_model:build", "--json")
    assert (code, len(json.loads(out)["matches"])) == (0, 4)


def test_hugging_face_folder_has_its_weights(folder: Path) -> None:
    save_hugging_face(folder / "hf")
    loaded = load_model("./hf")
    assert type(loaded.model).__name__ == "ConvNextForImageClassification"
    assert (loaded.random, loaded.processor) == (None, Path("hf"))
    stored = load_file(folder / "hf" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.model.state_dict().items())


def test_hugging_face_folder_of_another_architecture(folder: Path) -> None:
    save_hugging_face(folder / "hf", "ConvNextModel")
    assert type(load_model("./hf").model).__name__ == "ConvNextModel"


def test_hugging_face_weights_that_are_missing_are_reported(run, folder: Path) -> None:
    save_hugging_face(folder / "hf")
    file = folder / "hf" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "classifier" not in n}, file, metadata={"format": "pt"})
    _, _, err = run("convert", "./hf", "--output", "converted")
    # One line, and not the report of transformers.
    assert err == "sw-transplant: note: 2 weights are not in hf and random: classifier.bias, classifier.weight\n"


def test_hugging_face_config_alone_is_seeded(folder: Path) -> None:
    save_hugging_face(folder / "hf")
    (folder / "hf" / "model.safetensors").unlink()
    first, second, third = (load_model("./hf", seed=seed) for seed in (1, 1, 2))
    assert "random weights, seed 1" in str(first.random)
    weights = [next(loaded.model.parameters()) for loaded in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoint_and_class_count(run, folder: Path) -> None:
    import timm

    torch.manual_seed(7)
    original = timm.create_model("convnext_atto", num_classes=3)
    torch.save({"model": original.state_dict()}, folder / "weights.pth")
    words = ("convnext_atto", "--num-classes", 3, "--checkpoint", "weights.pth")
    code, _, err = run("convert", *words, "-o", "converted")
    assert (code, "random" in err) == (0, False)
    again = sw.load(timm.create_model("convnext_atto", num_classes=3), folder / "converted")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), original.eval()(images))


def test_checkpoint_for_a_callable(run, folder: Path) -> None:
    torch.manual_seed(7)
    weights = load_model("tiny_model:build", seed=7).model.state_dict()
    save_file(weights, folder / "weights.safetensors")
    loaded = load_model("tiny_model:build", checkpoint="weights.safetensors", seed=8)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())


# ---- convert and verify ----


def test_convert_saves_and_verify_reads(run, folder: Path) -> None:
    code, out, _ = run("convert", "tiny_model:build", "-o", "converted", "--tile", 3, "--form", "shift")
    assert code == 0
    assert "9 of 3x3" in out
    assert "Saved in converted" in out
    saved = sw.load(load_model("tiny_model:build").model, "converted")
    assert {module.form for module in saved.modules() if isinstance(module, sw.ShiftwiseConv2d)} == {"shift"}
    code, out, _ = run("verify", "tiny_model:build", "--converted", "converted", "--input-size", "16x20")
    assert code == 0
    assert out.startswith("OK")


def test_convert_reports_what_select_left(run, folder: Path) -> None:
    code, out, _ = run("convert", "tiny_model:build", "-o", "converted", "--select", "2", "--json")
    found = json.loads(out)
    assert code == 0
    [layer] = found["layers"]
    assert layer.pop("parameters") >= 8 * 9 * 9 + 8  # and whatever fills the last tiles
    assert layer == {"path": "2", "form": "auto", "stride": [1, 1], "channels": [8, 8], "kernels": [[9, 9]]}
    assert [skipped["reason"] for skipped in found["skipped"]] == ["left out by select"]
    assert found["config"] == sw.SWConfig().to_dict()


def test_convert_without_output_saves_nothing(run, folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, err = run("convert", "tiny_model:build")
    assert (code, "Shiftwise layers" in out, "nothing is saved" in err) == (0, True, True)
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_convert_may_repeat_but_not_destroy_weights(run, folder: Path) -> None:
    assert run("convert", "tiny_model:build", "-o", "converted")[0] == 0
    assert run("convert", "tiny_model:build", "-o", "converted")[0] == 0
    weights = (save_hugging_face(folder / "hf") / "model.safetensors").read_bytes()
    code, _, err = run("convert", "./hf", "-o", "hf")
    assert (code, "would be lost" in err) == (2, True)
    assert (folder / "hf" / "model.safetensors").read_bytes() == weights


def test_a_hugging_face_model_is_saved_as_such(run, folder: Path) -> None:
    save_hugging_face(folder / "hf")
    for _ in range(2):
        code, out, _ = run("convert", "./hf", "-o", "converted")
        assert code == 0
        assert "Saved in converted: model.safetensors and config.json." in out
    assert not (folder / "converted" / "sw_config.json").exists()
    plain, written = (load_file(folder / name / "model.safetensors") for name in ("hf", "converted"))
    assert plain.keys() == written.keys()
    assert all(torch.equal(plain[name], written[name]) for name in plain)
    code, out, _ = run("verify", "./hf", "--converted", "converted")
    assert code == 0
    assert out.startswith("OK")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_perturbed_weights_are_beyond_the_bound(run, folder: Path, words: tuple[str, ...]) -> None:
    run("convert", "tiny_model:build", "-o", "converted")
    file = folder / "converted" / "model.safetensors"
    weights = load_file(file)
    bank = next(name for name in weights if name.startswith("2.") and weights[name].dim() == 4)
    weights[bank] += 0.01 * torch.randn_like(weights[bank])
    save_file(weights, file, metadata={"format": "pt"})
    verify = ("verify", "tiny_model:build", "--converted", "converted", "--input-size", 16)
    code, out, _ = run(*verify, *words)
    assert code == 1
    assert json.loads(out)["ok"] is False if words else "FAILED" in out
    assert run(*verify, "--bound", 10)[0] == 0


def test_bound_decides(run) -> None:
    words = ("verify", "tiny_model:build", "--input-size", 16, "--tile", 3, "--form", "shift", "--dtype", "float32")
    assert run(*words)[0] == 0
    assert run(*words, "--bound", 0)[0] == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_verify_in_every_precision(run, dtype: str) -> None:
    code, out, _ = run(
        "verify",
        "tiny_model:build",
        "--input-size",
        16,
        "--dtype",
        dtype,
        "--device",
        "cpu",
        "--batch-size",
        3,
        "--json",
    )
    report = json.loads(out)
    assert (code, report["dtype"], report["device"], report["images"]) == (0, dtype, "cpu", 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_verify_on_the_gpu(run, dtype: str) -> None:
    words = ("verify", "tiny_model:build", "--input-size", 16, "--device", "cuda", "--dtype", dtype, "--json")
    code, out, _ = run(*words)
    assert (code, json.loads(out)["device"]) == (0, "cuda:0")


def test_verify_with_labels_of_an_npz(run, folder: Path) -> None:
    data = save_npz(folder / "data.npz")
    code, out, err = run(
        "verify", "tiny_model:build", "--data", data, "--input-size", 16, "--max-images", 7, "--batch-size", 4, "--json"
    )
    report = json.loads(out)
    assert (code, report["images"], report["same_top1"]["count"]) == (0, 7, 7)
    assert report["top1_original"] == report["top1_converted"]
    assert report["top1_original"]["of"] == 7
    assert report["data"] == str(data)
    assert "top-1" in err  # the table


def test_verify_with_class_folders(run, folder: Path) -> None:
    code, out, _ = run(
        "verify", "tiny_model:build", "--data", save_class_folders(folder / "val"), "--input-size", "16x12", "--json"
    )
    report = json.loads(out)
    assert (code, report["images"], report["top1_original"]["of"]) == (0, 10, 10)


def save_images(path: Path, *sizes: tuple[int, int]) -> Path:
    """A folder of images alone, of these heights and widths."""
    path.mkdir()
    generator = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / f"{index}.png")
    return path


def test_verify_with_a_folder_of_images(run, folder: Path) -> None:
    data = save_images(folder / "photos", (24, 20), (24, 20), (30, 30))
    code, out, err = run("verify", "tiny_model:build", "--data", data, "--size", 16, "--json")
    report = json.loads(out)
    assert (code, report["images"], report["top1_original"]) == (0, 3, None)
    (note,) = [line for line in err.splitlines() if "note: 3 images" in line]
    assert "3 images, without labels, 24x20 to 30x30: resized and cropped to 16x16 (--size;" in note
    assert "mean 0.485 0.456 0.406" in note


def test_verify_of_a_network_that_makes_images(run, folder: Path) -> None:
    data = save_images(folder / "photos", (24, 20), (24, 20), (13, 17), (24, 20))
    code, out, err = run("verify", "tiny_model:enlarges", "--data", data, "--no-resize", "--json")
    report = json.loads(out)
    assert (code, report["images"]) == (0, 4)
    assert "13x17 to 24x20: not resized, normalised" in err
    assert "PSNR" in err
    code, out, _ = run("verify", "tiny_model:enlarges", "--data", data, "--no-resize", "--dtype", "bfloat16", "--json")
    assert code == 0
    assert json.loads(out)["outputs"][0]["psnr"] is None or json.loads(out)["outputs"][0]["psnr"] > 30


def test_folders_that_are_not_the_models_classes_are_a_question(run, folder: Path) -> None:
    data = save_class_folders(folder / "val", classes=3)
    words = ("verify", "tiny_model:build", "--data", data, "--size", 16)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "has 3 class folders and the model gives 5 numbers for an image: which of them are they? --classes" in err
    (folder / "names.txt").write_text("class2\nnone\nclass1\n\nclass0\nother\n")
    code, out, _ = run(*words, "--classes", "names.txt", "--json")
    report = json.loads(out)
    assert (code, report["top1_original"]["of"]) == (0, 6)
    (folder / "names.json").write_text('["class2", "none", "class1", "class0", "other"]')
    again = json.loads(run(*words, "--classes", "names.json", "--json")[1])
    assert again["top1_original"] == report["top1_original"]
    code, out, err = run(*words, "--no-labels", "--json")
    assert (code, json.loads(out)["top1_original"], "6 images, without labels" in err) == (0, None, True)
    (folder / "names.txt").write_text("class2\nclass1\nclass0\n")
    code, _, err = run(*words, "--classes", "names.txt")
    assert (code, "names.txt has 3 names and the model gives 5 numbers" in err) == (2, True)


def test_labels_that_no_output_answers_are_a_question(run, folder: Path) -> None:
    data = save_class_folders(folder / "val", classes=5)
    code, _, err = run("verify", "tiny_model:embedding", "--data", data, "--size", 16)  # 8 numbers
    assert (code, "5 class folders and the model gives 8 numbers" in err) == (2, True)
    code, _, err = run("verify", "tiny_model:enlarges", "--data", data, "--size", 16)
    assert (code, "no output of the model is one number per class; --no-labels" in err) == (2, True)
    archive = save_npz(folder / "data.npz")
    assert run("verify", "tiny_model:enlarges", "--data", archive, "--size", 16)[0] == 2
    assert run("verify", "tiny_model:enlarges", "--data", archive, "--size", 16, "--no-labels")[0] == 0


def test_notes_on_arrays(run, folder: Path) -> None:
    def note(**arrays: np.ndarray) -> str:
        _, _, err = run("verify", "tiny_model:build", "--data", save_npz(folder / "a.npz", **arrays), "--size", 12)
        return next(line for line in err.splitlines() if " images" in line)

    assert "12 images, 16x16: resized to 12x12 (--size), normalised with mean 0.485" in note()
    images = np.zeros((12, 12, 12, 3), np.uint8)
    assert "not resized, normalised with mean 0 0 1," in note(images=images, mean=np.array([0, 0, 1.0]))
    assert "12x14: taken as they are" in note(images=np.zeros((12, 3, 12, 14), np.float32))


def test_convert_does_not_end_with_nothing_to_convert(run) -> None:
    for words in ((), ("--select", "1")):
        _, out, _ = run("convert", "tiny_model:build", *words)
        assert "No large depthwise convolution" not in out
    assert "left out by select" in out


@pytest.mark.parametrize("size", [(), ("--input-size", 48)])
def test_verify_of_a_hugging_face_folder(run, folder: Path, size: tuple[object, ...]) -> None:
    save_hugging_face(folder / "hf")
    code, out, err = run("verify", "./hf", "--data", save_class_folders(folder / "val"), "--json", *size)
    report = json.loads(out)
    assert (code, report["ok"], report["images"]) == (0, True, 10)
    assert [output["name"] for output in report["outputs"]] == ["logits"]
    assert "random" not in err


def test_data_of_a_hugging_face_folder_goes_through_its_processor(folder: Path, monkeypatch) -> None:
    import sw_transplant.cli.commands as commands

    seen = []
    monkeypatch.setattr(commands, "verify", lambda original, converted, data, **rest: seen.append(data))
    save_hugging_face(folder / "hf")
    data = save_class_folders(folder / "val")
    for size in ((), ("--input-size", "48")):
        main(["verify", "./hf", "--data", str(data), *size])
    assert [tuple(next(iter(batches))[0].shape) for batches in seen] == [(10, 3, 32, 32), (10, 3, 48, 48)]


def test_random_weights_are_said_where_they_matter(run) -> None:
    words = ("convnext_atto", "--num-classes", 2)
    code, out, err = run("verify", *words, "--input-size", 32, "--batch-size", 1, "--seed", 3)
    assert code == 0
    assert "random weights, seed 3" in err
    assert "note" not in out
    assert "random" not in run("inspect", *words)[2]


def test_trained_network_keeps_its_answers(run, folder: Path, shared: Path) -> None:
    (folder / "cifar_slak.py").write_text(
        "import timm, sw_transplant.models\n\ndef build():\n"
        "    return timm.create_model('slak_tiny', num_classes=10, depths=(2, 2, 4, 2), dims=(24, 48, 96, 160),\n"
        "                             kernel_size=(51, 49, 47, 13, 5), width_factor=1.0)\n"
    )
    archive = np.load(shared / "data" / "cifar10_test_1000.npz")
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    chosen = slice(0, 1000, 25)
    data = save_npz(
        folder / "cifar.npz", images=archive["images"][chosen], labels=archive["labels"][chosen], mean=mean, std=std
    )
    weights = shared / "data" / "slak_cifar10.safetensors"
    code, out, err = run(
        "verify", "cifar_slak:build", "--checkpoint", weights, "--data", data, "--input-size", 96, "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["same_top1"]["count"] == 40
    right = int((archive["logits"][chosen].argmax(1) == archive["labels"][chosen]).sum())
    assert report["top1_original"]["count"] == report["top1_converted"]["count"] == right


# ---- certificates ----


def test_convert_certifies_and_check_checks(run, folder: Path) -> None:
    code, out, _ = run("convert", "tiny_model:build", "-o", "converted", "--tile", 3, "--certificate", "--seed", 4)
    assert code == 0
    assert "certificate.json written" in out
    code, out, _ = run("check", "converted", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    words = ("check", "converted", "--model", "tiny_model:build")
    code, out, _ = run(*words, "--seed", 4)
    assert code == 0
    assert "the comparison, again" in out
    code, out, _ = run(*words, "--seed", 5)
    assert code == 1
    assert "weights of the original model" in out
    (folder / "converted" / "sw_config.json").write_text("{}")
    assert run("check", "converted")[0] == 1
    run("convert", "tiny_model:build", "-o", "converted")
    assert not (folder / "converted" / "certificate.json").exists()  # of another conversion


def test_verify_writes_a_certificate(run, folder: Path) -> None:
    words = ("verify", "tiny_model:build", "--size", 16, "--certificate", "here.json")
    assert run(*words)[0] == 0
    values = json.loads((folder / "here.json").read_text())
    assert (values["ok"], values["config"]["tile"], len(values["layers"])) == (True, None, 2)
    assert run(*words, "--bound", 0, "--form", "shift")[0] == 1
    assert json.loads((folder / "here.json").read_text())["ok"] is False


# ---- bad input ----

BAD = {
    "no command": ((), "COMMAND"),
    "unknown command": (("bench", "x"), "bench"),
    "unknown option": (("inspect", "tiny_model:build", "--wide"), "--wide"),
    "option of another command": (("inspect", "tiny_model:build", "--output", "x"), "--output"),
    "no model": (("inspect",), "MODEL"),
    "unknown name": (("inspect", "convnex_atto"), "did you mean convnext_atto"),
    "unknown tag": (("inspect", "convnext_atto.nowhere"), "nowhere"),
    "no folder": (("inspect", "facebook/convnext-tiny-224"), "not downloaded"),
    "no config": (("inspect", "."), "no config.json"),
    "hub name": (("inspect", "hf-hub:timm/convnext_atto.d2_in1k"), "module:callable"),
    "no module": (("inspect", "nowhere_to_be_found:build"), "nowhere_to_be_found"),
    "module without its dependency": (("inspect", "broken_module:build"), "no_such_dependency"),
    "no callable": (("inspect", "tiny_model:nothing"), "'nothing'"),
    "not callable": (("inspect", "tiny_model:number"), "int"),
    "a model itself": (("inspect", "tiny_model:model"), "Sequential"),
    "needs arguments": (("inspect", "tiny_model:needs"), "argument"),
    "returns no model": (("inspect", "tiny_model:other"), "returned str"),
    "classes of a callable": (("inspect", "tiny_model:build", "--num-classes", "3"), "--num-classes"),
    "no checkpoint": (("inspect", "tiny_model:build", "--checkpoint", "none.pth"), "none.pth"),
    "checkpoint of nonsense": (("inspect", "tiny_model:build", "--checkpoint", "tiny_model.py"), "tiny_model.py"),
    "bad number": (("inspect", "tiny_model:build", "--tile", "0"), "--tile"),
    "bad pattern": (("inspect", "tiny_model:build", "--select", "stages.*"), "stages.*"),
    "nothing to convert": (("convert", "tiny_model:small_kernels"), "lower --min-kernel"),
    "nothing to convert, with a table": (("verify", "tiny_model:only_tied"), "sw-transplant inspect tiny_model:only"),
    "output is a file": (("convert", "tiny_model:build", "-o", "tiny_model.py"), "is a file"),
    "output below a file": (("convert", "tiny_model:build", "-o", "tiny_model.py/x"), "tiny_model.py"),
    "no converted model": (("verify", "tiny_model:build", "--converted", "none"), "none"),
    "converted again": (("verify", "tiny_model:build", "--converted", "x", "--min-kernel", "5"), "--min-kernel"),
    "unknown device": (("verify", "tiny_model:build", "--device", "abacus"), "abacus"),
    "no such device": (("verify", "tiny_model:build", "--device", "cuda:99"), "cuda:99"),
    "device that computes nothing": (("verify", "tiny_model:build", "--device", "meta"), "meta"),
    "unknown dtype": (("verify", "tiny_model:build", "--dtype", "int8"), "int8"),
    "bad bound": (("verify", "tiny_model:build", "--bound", "nan"), "--bound"),
    "bad size": (("verify", "tiny_model:build", "--input-size", "16x"), "--input-size"),
    "no data": (("verify", "tiny_model:build", "--data", "none"), "none"),
    "data of nonsense": (("verify", "tiny_model:build", "--data", "tiny_model.py"), "tiny_model.py"),
    "images of nonsense": (("verify", "tiny_model:build", "--data", "."), "no images"),
    "weights as a model": (("inspect", "weights.pth"), "MODEL is a name of timm"),
    "weights in a folder": (("inspect", "./weights.safetensors"), "--checkpoint ./weights.safetensors"),
    "a graph as a model": (("verify", "model.onnx"), "exported graph"),
    "a source file as a model": (("inspect", "tiny_model.py"), "tiny_model:build"),
    "another file as a model": (("inspect", "notes.txt"), "MODEL is a name of timm"),
    "certificate of nothing": (("convert", "tiny_model:build", "--certificate"), "--output"),
    "check of no folder": (("check", "nowhere"), "no such folder"),
    "check without a certificate": (("check", "."), "certificate.json: no such file"),
    "classes without data": (("verify", "tiny_model:build", "--classes", "x"), "--data"),
    "no labels without data": (("verify", "tiny_model:build", "--no-labels"), "--data"),
    "size and no size": (("verify", "tiny_model:build", "--data", ".", "--no-resize", "--size", "8"), "--no-resize"),
    "classes without labels": (("verify", "tiny_model:build", "--data", ".", "--no-labels", "--classes", "x"), "leave"),
    "no classes": (("verify", "tiny_model:build", "--data", ".", "--classes", "none"), "none"),
    "a class twice": (("verify", "tiny_model:build", "--data", ".", "--classes", "notes.txt"), "each of them once"),
    "count without data": (("verify", "tiny_model:build", "--max-images", "3"), "--data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, case: str) -> None:
    words, fragment = BAD[case]
    code, out, err = run(*words)
    lines = [line for line in err.splitlines() if line not in ("this is no result", "")]
    lines = [line for line in lines if not line.startswith("sw-transplant: note:")]
    assert (code, out) == (2, "")
    assert len(lines) == 1, err
    assert lines[0].startswith("sw-transplant: error: ")
    assert fragment in lines[0]


def test_bad_data(run, folder: Path) -> None:
    labels = save_npz(folder / "labels.npz", labels=np.full(12, 5))
    code, _, err = run("verify", "tiny_model:build", "--data", labels, "--input-size", 16)
    assert (code, "5 classes" in err) == (2, True)
    save_class_folders(folder / "val")
    (folder / "val" / "class0" / "0.png").write_bytes(b"no image")
    code, _, err = run("verify", "tiny_model:build", "--data", folder / "val", "--input-size", 16)
    assert (code, "0.png" in err, "Traceback" in err) == (2, True, False)


def test_bad_hugging_face_folders(run, folder: Path) -> None:
    save_hugging_face(folder / "hf")
    code, _, err = run("inspect", "./hf", "--checkpoint", "weights.pth")
    assert (code, "--checkpoint" in err) == (2, True)
    (folder / "hf" / "model.safetensors").write_bytes(b"no weights")
    code, _, err = run("inspect", "./hf")
    assert (code, "cannot be loaded" in err, len(err.splitlines())) == (2, True, 1)
    (folder / "hf" / "config.json").write_text('{"model_type": "abacus"}')
    code, _, err = run("inspect", "./hf")
    assert (code, "abacus" in err, len(err.splitlines())) == (2, True, 1)


def test_folder_of_a_converted_model_is_no_model(run, folder: Path) -> None:
    run("convert", "tiny_model:build", "-o", "converted")
    code, _, err = run("verify", "./converted")
    assert (code, "--converted converted" in err) == (2, True)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if the package were not installed."""
    monkeypatch.delitem(sys.modules, "sw_transplant.models", raising=False)
    monkeypatch.setitem(sys.modules, package, None)


def test_missing_packages_name_the_extra(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hugging_face(folder / "hf")
    with monkeypatch.context() as patch:
        without(patch, "timm")
        code, _, err = run("inspect", "convnext_atto")
        assert (code, "sw-transplant[timm]" in err, len(err.splitlines())) == (2, True, 1)
    with monkeypatch.context() as patch:
        without(patch, "transformers")
        code, _, err = run("inspect", "./hf")
        assert (code, "sw-transplant[hf]" in err, len(err.splitlines())) == (2, True, 1)
    data = save_class_folders(folder / "val")
    without(monkeypatch, "PIL")
    code, _, err = run("verify", "tiny_model:build", "--data", data, "--input-size", 16)
    assert (code, "sw-transplant[hf]" in err.splitlines()[-1]) == (2, True)


def test_out_of_memory_is_bad_input(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("sw_transplant.cli.commands.verify", exhausted)
    code, _, err = run("verify", "tiny_model:build")
    assert (code, "error: CUDA out of memory. Tried" in err) == (2, True)


def test_traceback_on_request(run) -> None:
    words = ("convert", "tiny_model:small_kernels")
    assert "Traceback" not in run(*words)[2]
    code, _, err = run(*words, "--traceback")
    assert (code, "Traceback" in err, "NoLargeKernelError" in err) == (2, True, True)
    assert err.splitlines()[-1].startswith("sw-transplant: error: ")


def test_model_s_own_error_keeps_its_traceback(run) -> None:
    code, out, err = run("inspect", "tiny_model:broken")
    assert (code, out) == (3, "")
    assert "in broken" in err
    assert "ValueError: the model's own error" in err
    with pytest.raises(ValueError, match="own error") as caught:
        load_model("tiny_model:broken")
    assert not isinstance(caught.value, InputError)


def test_interrupt_is_quiet(run) -> None:
    assert run("inspect", "tiny_model:interrupted") == (130, "", "this is no result\n")


@pytest.mark.parametrize(
    "words", [("--help",), ("inspect", "--help"), ("convert", "--help"), ("verify", "--help"), ("check", "--help")]
)
def test_help_has_examples(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"  sw-transplant {words[0].strip('-') if len(words) > 1 else 'verify'} " in out.partition("examples:")[2]
    assert "exit codes:" in out


# ---- as a process ----


def test_process_prints_json_alone(folder: Path) -> None:
    process = start("verify", "tiny_model:build", "--input-size", 16, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["ok"] is True
    assert "this is no result" in err


@pytest.mark.exhaustive
def test_process_tells_bad_input(folder: Path) -> None:
    process = start("verify", "tiny_model:nothing", "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1].startswith("sw-transplant: error: ")


def test_process_is_quick_to_help(folder: Path) -> None:
    probe = (
        "import sys; from sw_transplant.cli import main\n"
        "try: main(['--version'])\n"
        "finally: print(sorted({'timm', 'transformers', 'torchvision', 'PIL'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", probe]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert out == f"sw-transplant {sw.__version__}\n[]\n"


HANDLERS = {"default": signal.SIG_DFL, "ignored": signal.SIG_IGN}


def stopped(process: subprocess.Popen, number: int) -> tuple[int, str, str]:
    """Sends the signal once the process says that it waits: exit code, stdout, stderr from then on."""
    with process:
        assert process.stderr is not None
        while "waiting" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
        return process.returncode, out, err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("number", "code", "inherited"),
    [(signal.SIGINT, 130, "ignored"), (signal.SIGTERM, 143, "default")],
)
def test_process_stops_quietly_when_told(folder: Path, number: int, code: int, inherited: str) -> None:
    """Whatever its parent does with the signal, which the child inherits; what cleans up behind itself can do so."""
    process = start("inspect", "tiny_model:waits", preexec_fn=lambda: signal.signal(number, HANDLERS[inherited]))
    assert stopped(process, number) == (code, "", "")
    assert (folder / "tidied_up").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("inherited", HANDLERS)
@pytest.mark.parametrize("command", ["module", "script"])
def test_process_stops_quietly_while_it_imports(
    folder: Path, number: int, code: int, inherited: str, command: str
) -> None:
    (folder / "torch.py").write_text(
        "import sys, time\nprint('waiting', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    )
    script = folder / "sw-transplant"
    script.write_text("import sys\nfrom sw_transplant.cli import main\nsys.exit(main())\n")
    process = subprocess.Popen(
        [sys.executable, *({"module": ["-m", "sw_transplant"], "script": [str(script)]}[command]), "inspect", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        preexec_fn=lambda: signal.signal(number, HANDLERS[inherited]),
    )
    assert stopped(process, number) == (code, "", "")


def test_main_gives_the_handlers_back(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it ends. Importing the package, as these tests do, takes no signal over."""

    def handlers() -> list:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, during = handlers(), []

    def inspect(_) -> Result:
        during.extend(handlers())
        raise KeyboardInterrupt

    assert not [handler for handler in before if getattr(handler, "__module__", None) == interrupts.__name__]
    monkeypatch.setattr("sw_transplant.cli.cli.run_inspect", inspect)
    assert run("inspect", "tiny_model:build")[0] == 130
    assert during
    assert not set(during) & set(before)
    assert handlers() == before


def test_main_runs_in_any_thread(folder: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["inspect", "tiny_model:build"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_process_whose_output_nobody_reads(folder: Path) -> None:
    process = start("inspect", "tiny_model:build")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "this is no result\n" * 2
    assert process.wait(timeout=60) == 141
