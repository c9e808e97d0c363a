"""load_checkpoint: every wrapping of the official files, and every refusal, after which the model is as it was."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
