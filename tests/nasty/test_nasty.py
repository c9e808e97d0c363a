"""Networks with nasty habits keep their function, or are refused with a reason; and the judge who says so is no fool.

`python -m tests.nasty --only SEED -v` shows a seed that fails, as the smallest network that fails alike.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nasty.habit import HABITS
from tests.nasty.judge import judge
from tests.nasty.networks import Block, Convolution, Network, Part, draw
from tests.nasty.processes import run_all
from tests.nasty.smaller import simpler
from tests.nasty.source import source

ROOT = Path(__file__).resolve().parents[2]
SEEDS = list(itertools.islice((seed for seed in itertools.count() if not draw(seed).isolated), 100))
LONG_RUN = 2000


@pytest.fixture(autouse=True)
def _one_thread():
    """Maps are small: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", SEEDS)
def test_network(seed: int) -> None:
    verdict = judge(draw(seed))
    assert not verdict.failed, f"{verdict.outcome}: {verdict.where}: {verdict.what} (habits: {verdict.habits})"


def _command(*arguments: str, limit: float) -> None:
    """Runs ``python -m tests.nasty`` in a process that has neither threads nor a GPU's: those do not survive forks.

    Raises:
        AssertionError: it does not exit with 0; the message is what it printed.
    """
    run = [sys.executable, "-m", "tests.nasty", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-3000:]


@pytest.mark.exhaustive  # tests/find/test_threads.py runs each time
def test_threads() -> None:
    _command("--threads", limit=120)


@pytest.mark.early
@pytest.mark.exhaustive
def test_many_networks() -> None:
    _command(f"--count={LONG_RUN}", f"--jobs={os.cpu_count() or 1}", "--limit=60", limit=4 * 3600)


@pytest.mark.exhaustive
def test_every_habit_alone() -> None:
    _command("--habit=all", f"--jobs={os.cpu_count() or 1}", limit=3600)


# ---- the table of habits


def test_every_habit_is_drawn() -> None:
    held = {one.name for seed in range(3 * LONG_RUN) for one in draw(seed).all_habits}
    assert held == set(HABITS)


def test_networks_are_drawn_alike_and_compile() -> None:
    for seed in range(100):
        assert draw(seed) == draw(seed)
        compile(source(draw(seed)), "drawn", "exec")


def test_almost_all_networks_can_be_built() -> None:
    """A few habits do not go together."""
    outcomes = [judge(draw(seed), _same, steps=1).outcome for seed in SEEDS]
    assert outcomes.count("void") <= 3


def test_simpler_networks_are_valid() -> None:
    for seed in range(10):
        for network in simpler(draw(seed)):
            compile(source(network), "drawn", "exec")


# ---- the judge


def _network(*, world: tuple[str, ...] = (), kind: str = "sum") -> Network:
    """A tame network: a 7x7 convolution with BatchNorm beside a 3x3, then a 1x1."""
    parts = (Part(Convolution((3, 3), (1, 1)), ""),) if kind == "sum" else ()
    block = Block(kind, Convolution((7, 7), (3, 3)), None, 1, parts, "plus", "attributes", "", "mix")
    return Network(0, 4, (block,), head=True, habits=world)


def _same(net: nn.Module, config: object, *, inplace: bool) -> nn.Module:
    return net


def test_a_network_is_the_same_as_itself() -> None:
    verdicts = [judge(draw(seed), _same) for seed in SEEDS[:6]]
    assert {verdict.outcome for verdict in verdicts} == {"same"}


def test_a_tame_network_is_converted() -> None:
    for kind in ("sum", "conv", "functional"):
        verdict = judge(_network(kind=kind))
        assert (verdict.outcome, verdict.layers, verdict.raised) == ("same", 1, 0), verdict


def _sabotage(change: Callable[[nn.Module, nn.Module], Any]) -> Callable[..., nn.Module]:
    """A conversion that changes one thing: ``change(net, large)`` on a copy, with its large convolution."""

    def convert(net: nn.Module, config: object, *, inplace: bool) -> nn.Module:
        twin = copy.deepcopy(net)
        change(twin, twin.blocks[0].site.conv0)
        return twin

    return convert


def _hooked(run: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, nn.Module], Any]:
    return lambda net, large: large.register_forward_pre_hook(run)


def _changed_later(run: Callable[[nn.Module], Any], calls: int) -> Callable[[nn.Module, nn.Module], Any]:
    """Does something at one of the calls only."""
    count = itertools.count()
    return _hooked(lambda module, inputs: run(module) if next(count) == calls else None)


def _write(x: Tensor) -> None:
    x.data[..., 0, 0] = 0.5


def _scale(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(1 + 1e-7)


SABOTAGE = {
    "output": lambda net, large: _scale(large),
    "gradient of the input": lambda net, large: net.blocks[0].register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    "gradients": lambda net, large: large.weight.register_hook(lambda g: g * 1.001),
    "random state": _hooked(lambda module, inputs: random.random() and None),
    "input afterwards": _hooked(lambda module, inputs: _write(inputs[0])),
    "requires_grad": lambda net, large: large.bias.requires_grad_(False),
    "parameters and buffers": lambda net, large: net.blocks[0].site.bn1.running_var.mul_(1.0001),
    "attributes": lambda net, large: setattr(net.head, "in_features", 5),
    "structure": lambda net, large: setattr(net, "forward", lambda x: net.blocks(x)),
    "eval as it is": _changed_later(_scale, 4),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_judge_sees(what: str) -> None:
    verdict = judge(_network(), _sabotage(SABOTAGE[what]))
    assert verdict.outcome == "wrong"
    assert verdict.kind == what or what in ("eval as it is", "input afterwards", "parameters and buffers"), verdict


def test_the_judge_sees_what_is_raised() -> None:
    def fails(module: nn.Module, inputs: object) -> None:
        raise RuntimeError("broken")

    verdict = judge(_network(), _sabotage(_hooked(fails)))
    assert (verdict.outcome, verdict.where) == ("loud", "as it is")


def test_the_judge_sees_that_the_original_was_written_to() -> None:
    def convert(net: nn.Module, config: object, *, inplace: bool) -> nn.Module:
        twin = copy.deepcopy(net)
        with torch.no_grad():
            net.blocks[0].site.conv0.weight.mul_(2).mul_(0.5)
        return twin

    verdict = judge(_network(), convert)
    assert (verdict.outcome, verdict.kind) == ("wrong", "convert: the network that was given changes")


def test_the_judge_sees_that_random_states_move() -> None:
    def convert(net: nn.Module, config: object, *, inplace: bool) -> nn.Module:
        torch.rand(1)
        return copy.deepcopy(net)

    verdict = judge(_network(), convert)
    assert (verdict.outcome, verdict.kind, verdict.what) == ("wrong", "convert: random state", "torch")


# ---- processes


def test_a_network_that_hangs_is_left() -> None:
    def work(network: Network, note: Callable[[str], None]) -> str:
        note("sleeping")
        time.sleep(60 if network.seed else 0)
        return "awake"

    started = time.monotonic()
    results = {
        one.seed: result
        for one, result in run_all([replace(_network(), seed=s) for s in (0, 1)], work, jobs=2, limit=1)
    }
    assert results[0] == "awake"
    assert results[1][:2] == ("hang", "sleeping")
    assert time.monotonic() - started < 30


def test_a_network_that_kills_its_process_is_loud() -> None:
    def work(network: Network, note: Callable[[str], None]) -> None:
        note("dying")
        os._exit(3)

    ((_, result),) = run_all([_network()], work, jobs=1, limit=20)
    assert result == ("loud", "dying", "Crash: exit code 3")
