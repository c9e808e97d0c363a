"""load_checkpoint: every wrapping of the official files, and every refusal, after which the model is as it was."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sw_transplant.models import SLaK, load_checkpoint

State = dict[str, torch.Tensor]


def _model(seed: int, num_classes: int = 3) -> SLaK:
    torch.manual_seed(seed)
    kernels = (7, 7, 7, 7, 3)
    return SLaK(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), kernel_size=kernels, num_classes=num_classes).eval()


@pytest.fixture
def state() -> State:
    """The weights to load."""
    model = _model(seed=1)
    for buffer in model.buffers():
        buffer.add_(1)
    return model.state_dict()


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _assert_loaded(model: nn.Module, state: State) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def _assert_refused(path: Path, message: str, model: nn.Module | None = None) -> str:
    model = _model(seed=0) if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(model, path)
    _assert_loaded(model, before)
    assert path.name in str(caught.value)
    return str(caught.value)


WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "optimizer": {"state": {}}},
    "module": lambda s: {"module": s},
    "model_ema": lambda s: {"model_ema": s},
    "empty model": lambda s: {"model": {}, "state_dict": s},
    "training arguments": lambda s: {"model": s, "args": argparse.Namespace(lr=4e-3, model="SLaK_tiny", aa=None)},
    "module. prefix": lambda s: _prefixed(s, "module."),
    "_orig_mod. prefix": lambda s: _prefixed(s, "_orig_mod."),
    "both prefixes": lambda s: _prefixed(s, "module._orig_mod."),
    "both prefixes, other order": lambda s: _prefixed(s, "_orig_mod.module."),
    "wrapped and prefixed": lambda s: {"state_dict": _prefixed(s, "module._orig_mod.")},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappings_are_read(wrap: Callable[[State], Any], state: State, tmp_path: Path) -> None:
    torch.save(wrap(state), tmp_path / "official.pth")
    model = _model(seed=0)
    load_checkpoint(model, tmp_path / "official.pth")
    _assert_loaded(model, state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_read(prefix: str, state: State, tmp_path: Path) -> None:
    save_file(_prefixed(state, prefix), tmp_path / "weights.safetensors")
    model = _model(seed=0)
    load_checkpoint(model, str(tmp_path / "weights.safetensors"))
    _assert_loaded(model, state)


def test_model_is_preferred_to_its_average(state: State, tmp_path: Path) -> None:
    average = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model_ema": average, "model": state}, tmp_path / "both.pth")
    model = _model(seed=0)
    load_checkpoint(model, tmp_path / "both.pth")
    _assert_loaded(model, state)


def test_a_wrapped_model_is_loaded_too(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pth")
    model = _model(seed=0)
    load_checkpoint(nn.DataParallel(model), tmp_path / "plain.pth")
    _assert_loaded(model, state)


def test_values_take_the_dtype_of_the_model(state: State, tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pth")
    model = _model(seed=0)
    load_checkpoint(model, tmp_path / "half.pth")
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight.detach(), state["head.weight"].half().float(), rtol=0, atol=0)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    _assert_refused(tmp_path / "nowhere.pth", "no such file")
    (tmp_path / "folder.pth").mkdir()
    _assert_refused(tmp_path / "folder.pth", "no such file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_a_truncated_file_is_refused(suffix: str, kept: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    _assert_refused(path, "damaged")


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_stored_code_is_refused_and_not_run(state: State, tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    torch.save({"model": state, "payload": _Payload(victim)}, tmp_path / "zip.pth")
    _assert_refused(tmp_path / "zip.pth", "not safe to load")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Payload(victim), protocol=2))
    _assert_refused(tmp_path / "raw.pth", "not safe to load")
    assert not victim.exists()


def test_missing_unexpected_and_reshaped_tensors_are_named(state: State, tmp_path: Path) -> None:
    wrong = dict(state)
    del wrong["norm.bias"]
    wrong["stages.9.0.gamma"] = torch.zeros(4)
    wrong["head.weight"] = torch.zeros(1000, 4)
    torch.save(wrong, tmp_path / "wrong.pth")
    message = _assert_refused(tmp_path / "wrong.pth", "does not fit SLaK")
    assert "1 missing: norm.bias" in message
    assert "1 unexpected: stages.9.0.gamma" in message
    assert "1 of another shape: head.weight (1000, 4) instead of (3, 4)" in message


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_one_fault_is_enough(fault: str, state: State, tmp_path: Path) -> None:
    wrong = dict(state)
    if fault == "missing":
        del wrong["norm.bias"]
    elif fault == "unexpected":
        wrong["extra"] = torch.zeros(1)
    else:
        wrong["norm.bias"] = torch.zeros(5)
    torch.save(wrong, tmp_path / "wrong.pth")
    _assert_refused(tmp_path / "wrong.pth", f"1 {fault}: ")


def test_only_a_few_names_are_shown(state: State, tmp_path: Path) -> None:
    torch.save({"norm.bias": state["norm.bias"]}, tmp_path / "little.pth")
    message = _assert_refused(tmp_path / "little.pth", f"{len(state) - 1} missing: ")
    assert len(message) < 600


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    message = _assert_refused(tmp_path / "other.pth", "none of its 1 tensors is one of the model's")
    assert "fc.weight" in message
    assert "downsample_layers.0.0.weight" in message


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, [torch.zeros(2)], torch.zeros(2), None], ids=str)
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "empty.pth")
    _assert_refused(tmp_path / "empty.pth", "holds no weights")


def test_an_entry_that_is_no_tensor_is_refused(state: State, tmp_path: Path) -> None:
    torch.save({**state, "epoch": 3}, tmp_path / "mixed.pth")
    _assert_refused(tmp_path / "mixed.pth", "entry 'epoch' is of type int")


def test_a_name_that_comes_twice_is_refused(state: State, tmp_path: Path) -> None:
    torch.save({**state, "module.head.bias": torch.zeros(3)}, tmp_path / "twice.pth")
    _assert_refused(tmp_path / "twice.pth", "'head.bias' comes twice")


def test_a_model_without_memory_is_refused(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pth")
    with torch.device("meta"):
        model = _model(seed=0)
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_checkpoint(model, tmp_path / "plain.pth")


def _training_checkpoint(state: State) -> dict[str, Any]:
    """What the official programs write: AdamW's groups with the rates of a NumPy schedule, and their arguments."""
    groups = [{"lr": np.float64(4e-3), "weight_decay": np.float32(0.05), "betas": (0.9, 0.999), "params": [0, 1]}]
    groups[0]["lr_scale"] = np.linspace(0.0, 1.0, 3)[1]
    average = {name: torch.full_like(tensor, 2) for name, tensor in state.items()}
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    arguments = argparse.Namespace(model="SLaK_tiny", lr=4e-3, kernel_size=[51, 49, 47, 13, 5], sparse=True, aa=None)
    return {
        "model": state,
        "model_ema": average,
        "optimizer": {"state": moments, "param_groups": groups},
        "epoch": np.int64(12),
        "scaler": {"scale": 65536.0},
        "args": arguments,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_is_read(zipped: bool, state: State, tmp_path: Path) -> None:
    content = _training_checkpoint(state)
    torch.save(content, tmp_path / "checkpoint-best.pth", _use_new_zipfile_serialization=zipped)
    model = _model(seed=0)
    load_checkpoint(model, tmp_path / "checkpoint-best.pth")
    _assert_loaded(model, state)
    load_checkpoint(model, tmp_path / "checkpoint-best.pth", prefer="ema")
    _assert_loaded(model, content["model_ema"])


def test_numbers_of_either_numpy_are_read(state: State, tmp_path: Path) -> None:
    """Files of NumPy 1 name numpy.core, those of NumPy 2 numpy._core; pickle writes what is installed here."""
    torch.save(_training_checkpoint(state), tmp_path / "now.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "now.pth").read_bytes()
    old, new = b"cnumpy.core.multiarray\nscalar", b"cnumpy._core.multiarray\nscalar"
    assert (old in content) != (new in content)
    other = content.replace(old, new) if old in content else content.replace(new, old)
    (tmp_path / "other.pth").write_bytes(other)
    model = _model(seed=0)
    load_checkpoint(model, tmp_path / "other.pth")
    _assert_loaded(model, state)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (Path("x"), "pathlib.PosixPath"),
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (np.dtype("O"), "numpy.dtype"),
        (np.dtype([("a", "f8"), ("b", "O")]), "numpy.dtype"),
        (np.str_("text"), "numpy.dtype"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (os.system, "posix.system"),
    ],
    ids=["path", "array", "objects", "record", "text", "module", "function"],
)
def test_anything_else_is_refused_by_its_name(stored: Any, name: str, state: State, tmp_path: Path) -> None:
    torch.save({**_training_checkpoint(state), "more": stored}, tmp_path / "more.pth")
    message = _assert_refused(tmp_path / "more.pth", "not safe to load")
    assert f"it holds {name}" in message


def test_averaged_weights_have_to_be_there(state: State, tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "plain.pth")
    model = _model(seed=0)
    with pytest.raises(ValueError, match=r"plain\.pth: holds no averaged weights"):
        load_checkpoint(model, tmp_path / "plain.pth", prefer="ema")
    with pytest.raises(ValueError, match="prefer 'best', expected one of"):
        load_checkpoint(model, tmp_path / "plain.pth", prefer="best")


def test_masks_come_from_zeros(tmp_path: Path) -> None:
    """Of SW's filters, and of SLaK's weights; official sparse files hold zeros and no masks."""
    import timm

    torch.manual_seed(0)
    settings = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "kernel_size": (9, 9, 7, 7, 3), "num_classes": 3}
    trained = timm.create_model("sw_tiny", **settings)
    path = trained.stages[0][0].large_kernel.paths[1]
    with torch.no_grad():
        path.weight[:4] = 0
        path.weight[4, 0, 0] = 0  # some taps: the filter is in use
    torch.save({"model": trained.state_dict()}, tmp_path / "sparse.pth")
    model = timm.create_model("sw_tiny", **settings)
    load_checkpoint(model, tmp_path / "sparse.pth", masks="from_weights")
    read = model.stages[0][0].large_kernel.paths
    assert int((~read[1].mask).sum()) == 4
    assert not read[1].mask.flatten()[:4].any()
    assert read[0].mask is None
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), trained.eval()(x))

    state = _model(seed=1).state_dict()
    state["stages.0.0.pwconv1.weight"][:, ::2] = 0
    state["stages.0.0.large_kernel.LoRA1.conv.weight"][0] = 0
    torch.save(state, tmp_path / "slak.pth")
    slak = _model(seed=0)
    with pytest.raises(ValueError, match=r"no filter of a large kernel is zero.*or try only_L=False"):
        load_checkpoint(slak, tmp_path / "slak.pth", masks="from_weights")
    load_checkpoint(slak, tmp_path / "slak.pth", masks="from_weights", only_L=False)
    block = slak.stages[0][0]
    assert block.pwconv1.sparsity_mask.float().mean().item() == 0.5
    assert int((~block.large_kernel.LoRA1.conv.sparsity_mask).sum()) == block.large_kernel.LoRA1.conv.weight[0].numel()
    assert not hasattr(block.pwconv2, "sparsity_mask")
