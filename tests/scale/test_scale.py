"""Training in two processes that torchrun starts: the same curves as without the conversion, and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from sw_transplant import ShiftwiseConv2d, convert, restore
from sw_transplant.check.verify import bound_for
from tests.runtime_models import images
from tests.scale.program import STEPS, batch, optimizer_of, plain

ROOT = Path(__file__).resolve().parents[2]
BOUND = bound_for(torch.float32)
Run = tuple[Path, list[Any]]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs a job of the program, once: its folder, and what either rank found."""
    done: dict[str, Run] = {}

    def start(job: str) -> Run:
        if job not in done:
            folder = tmp_path_factory.mktemp(job)
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            command = [sys.executable, *launcher, "-m", "tests.scale.program", job, str(folder)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            assert process.returncode == 0, process.stderr[-4000:]
            done[job] = folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
        return done[job]

    return start


def assert_learned_alike(ranks: list[Any], states: list[int]) -> None:
    """Every rank's losses, and the weights of those ranks that have them."""
    for rank in ranks:
        expected, got = rank["original"]["losses"], rank["converted"]["losses"]
        assert len(got) >= STEPS
        assert sum(expected[-4:]) < 0.95 * sum(expected[:4]), "it learns nothing"
        assert got == pytest.approx(expected, rel=1e-5)
    for number in states:
        converted = convert(plain())
        converted.load_state_dict(ranks[number]["converted"]["state"])
        state, wanted = restore(converted).state_dict(), ranks[number]["original"]["state"]
        assert list(state) == list(wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_ddp(run: Callable[[str], Run]) -> None:
    _, ranks = run("ddp")
    assert_learned_alike(ranks, [0, 1])
    assert ranks[0]["converted"]["losses"] != ranks[1]["converted"]["losses"]
    weights = [dict(rank["converted"]["state"]) for rank in ranks]
    for name, tensor in weights[0].items():
        if "running" not in name:  # each has those of its halves
            assert torch.equal(tensor, weights[1][name]), name


def test_batchnorms_may_be_synchronised(run: Callable[[str], Run]) -> None:
    """The gradients are those of the whole batch in one process; on a CPU PyTorch itself refuses, as for any model."""
    _, ranks = run("ddp")
    model = convert(plain())
    given, labels = batch(0)
    loss = F.cross_entropy(model(given), labels)
    loss.backward()
    assert sum(rank["synchronised"]["loss"] for rank in ranks) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for rank in ranks:
        assert "expected input tensor to be on" in rank["synchronised"]["refused"]
        for name, parameter in model.named_parameters():
            got = rank["synchronised"]["gradients"][name]
            assert (got - parameter.grad).norm() <= 10 * BOUND * parameter.grad.norm() + 1e-7, name


@pytest.mark.parametrize("first", ["convert", "synchronise"])
def test_conversion_and_synchronisation_in_either_order(first: str) -> None:
    synchronise = nn.SyncBatchNorm.convert_sync_batchnorm
    model = synchronise(convert(plain())) if first == "convert" else convert(synchronise(plain()))
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [nn.SyncBatchNorm] * 3
    assert count_layers(model) == 2
    expected = convert(plain())
    assert list(model.state_dict()) == list(expected.state_dict())
    assert torch.equal(model(images(4)), expected(images(4)))  # in one process there is nothing to synchronise
    assert_same(model.state_dict(), expected.state_dict())
    assert_same(restore(model).state_dict(), restore(expected).state_dict())
    assert torch.equal(model.eval()(images(4)), expected.eval()(images(4)))


def count_layers(model: nn.Module) -> int:
    return sum(isinstance(module, ShiftwiseConv2d) for module in model.modules())


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.exhaustive
def test_fsdp2(run: Callable[[str], Run]) -> None:
    _, ranks = run("fsdp")
    assert_learned_alike(ranks, [0])  # the whole state is on rank 0
    assert all(rank["kinds"] == {"DTensor"} for rank in ranks)
    assert all("sharded by FSDP" in rank["refused"] for rank in ranks)
    assert all("get_model_state_dict" in rank["refused"] for rank in ranks)


@pytest.mark.exhaustive
def test_two_write_a_checkpoint_and_one_reads_it(run: Callable[[str], Run]) -> None:
    """This process goes on where the two were, on whole batches."""
    folder, _ = run("fsdp")
    curves = {}
    for name, model in {"original": plain(), "converted": convert(plain())}.items():
        optimizer = optimizer_of(model)
        untrained = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / name)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        assert not torch.equal(model.state_dict()["0.weight"], untrained["0.weight"])
        assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS / 2}
        losses = []
        for step in range(STEPS // 2, STEPS):
            given, labels = batch(step)
            loss = F.cross_entropy(model(given), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves[name] = losses
    assert curves["converted"] == pytest.approx(curves["original"], rel=1e-5)


@pytest.mark.exhaustive
def test_accelerate_and_trainer(run: Callable[[str], Run]) -> None:
    import transformers

    folder, ranks = run("accelerate")
    assert_learned_alike(ranks, [0, 1])
    assert all(ranks[0][kind]["back"] for kind in ("original", "converted"))  # rank 0 has written its BatchNorms
    assert ranks[0]["processes"] == 2
    first, second = ranks[0]["curves"]
    assert len(first) == STEPS
    assert second == pytest.approx(first, rel=1e-6)
    loaded = transformers.ConvNextForImageClassification.from_pretrained(folder / "saved")
    assert count_layers(loaded) == 4
    assert_same(loaded.state_dict(), ranks[0]["trained"])
