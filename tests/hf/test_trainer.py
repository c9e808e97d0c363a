"""transformers' Trainer on a converted model: the same losses, and checkpoints that it comes back from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from sw_transplant import SWConfig, restore
from sw_transplant.hf import last_checkpoint
from tests.acceptance import shiftwise_layers
from tests.hf.training import EVERY, STEPS, model, trainer

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"dense": SWConfig(), "edges": SWConfig(edges=2)}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SWConfig, Path, Any]:
    """A training run without interruption: how the model was converted, its folder, its Trainer."""
    folder, threads = tmp_path_factory.mktemp("run"), torch.get_num_threads()
    torch.set_num_threads(1)
    whole = trainer(model(KINDS[request.param]), folder)
    whole.train()
    torch.set_num_threads(threads)
    return KINDS[request.param], folder, whole


def losses(one: Any) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def assert_same_state(one: Any, other: Any) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_trainer_trains_what_it_would_train_without_the_conversion(tmp_path: Path) -> None:
    curves = []
    for config in (None, SWConfig()):
        one = trainer(model(config), tmp_path, save_strategy="no", max_steps=20)
        one.train()
        curves.append(losses(one))
    assert len(curves[0]) == 20
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


def test_resuming_continues_bit_for_bit(run: tuple[SWConfig, Path, Any]) -> None:
    config, folder, whole = run
    resumed = trainer(model(config), folder)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # all that matters is in the checkpoint
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{EVERY}"))
    assert losses(resumed) == losses(whole)
    assert_same_state(resumed.model, whole.model)


def test_a_checkpoint_is_a_folder_like_any_other(run: tuple[SWConfig, Path, Any]) -> None:
    config, folder, whole = run
    loaded = type(whole.model).from_pretrained(folder / f"checkpoint-{STEPS}")
    assert shiftwise_layers(loaded)
    assert_same_state(loaded, whole.model)
    names = load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors").keys()
    assert (names == model(None).state_dict().keys()) is (config.edges is None)


def test_a_plain_model_never_resumes_with_other_kernels(run: tuple[SWConfig, Path, Any], tmp_path: Path) -> None:
    """It has those that were trained, or fails; the optimizer's moments are not its own, so that it makes no step."""
    config, folder, whole = run
    plain = trainer(model(None), tmp_path, max_steps=STEPS)
    if config.edges:
        with pytest.raises(RuntimeError, match=r"size mismatch for .*stages\.0\.layers\.0\.dwconv\.weight"):
            plain.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
    else:
        plain.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}"))
        assert_same_state(plain.model, restore(whole.model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_go(kind: str, tmp_path: Path) -> None:
    one = trainer(
        model(KINDS[kind]),
        tmp_path,
        eval_strategy="steps",
        eval_steps=EVERY,
        load_best_model_at_end=True,
        metric_for_best_model="best",
        greater_is_better=True,
        save_total_limit=1,
    )
    scores = iter([1.0, 3.0, 2.0])
    one.compute_metrics = lambda _: {"best": next(scores)}
    middle: dict[str, torch.Tensor] = {}
    evaluate = one.evaluate

    def watch(*args: Any, **kwargs: Any) -> Any:
        if one.state.global_step == 2 * EVERY:
            middle.update({name: tensor.clone() for name, tensor in one.model.state_dict().items()})
        return evaluate(*args, **kwargs)

    one.evaluate = watch
    one.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == [f"checkpoint-{2 * EVERY}"]
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, middle[name]), name


def test_resuming_after_a_kill_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.hf.training", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert get_last_checkpoint(str(tmp_path)).endswith(f"checkpoint-{2 * EVERY}"), "what died would not be taken anyway"
    whole = last_checkpoint(tmp_path)
    assert whole == str(tmp_path / f"checkpoint-{EVERY}")
    resumed = trainer(model(), tmp_path)
    resumed.train(resume_from_checkpoint=whole)
    undisturbed = trainer(model(), tmp_path, save_strategy="no")
    undisturbed.train()
    assert_same_state(resumed.model, undisturbed.model)
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")


DAMAGE = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "state cut": lambda folder: os.truncate(folder / "trainer_state.json", 100),
    "state of another step": lambda folder: edit_step(folder, 5),
    "weights cut": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "shard missing": lambda folder: (folder / "model.safetensors").rename(folder / "elsewhere"),
}


def edit_step(folder: Path, step: int) -> None:
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": step}))


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_passed_over(case: str, run: tuple[SWConfig, Path, Any], tmp_path: Path) -> None:
    _, folder, _ = run
    for step in (EVERY, 2 * EVERY):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged = tmp_path / f"checkpoint-{2 * EVERY}"
    (damaged / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert last_checkpoint(tmp_path) == str(damaged)
    DAMAGE[case](damaged)
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{EVERY}")


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-final").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "absent") is None
