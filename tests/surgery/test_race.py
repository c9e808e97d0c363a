"""What tune decides, by a clock that the test sets: the fastest where that is certain, else what "auto" takes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import sw_transplant as sw
from sw_transplant.surgery import tuning
from sw_transplant.surgery.race import MOST, Race, chance


def run(times: Callable[[str, int], float], names: str = "abc", least: int = 5) -> Race:
    """A race in which each takes the time that is said for its name and round."""
    race = Race(list(names), "a", least)
    while order := race.order():
        race.add({name: times(name, race.rounds) for name in order})
    return race


def test_sign_test() -> None:
    assert chance(0, 0) == chance(1, 1) == chance(1, 0) == 1
    assert chance(10, 0) == chance(0, 10) == 2 / 1024
    assert chance(9, 1) == 2 * 11 / 1024


def test_a_clear_winner_is_found_early_and_the_slow_run_no_more() -> None:
    race = run(lambda name, _: {"a": 2.0, "b": 1.0, "c": 9.0}[name])
    assert (race.winner, race.certain, race.rounds) == ("b", True, 11)  # 2 / 2 ** 11 is the first below one in 1,000
    race = run(lambda name, _: {"a": 1.0, "b": 2.0, "c": 9.0}[name])
    assert (race.winner, race.certain, race.rounds) == ("a", True, 11)
    slow = run(lambda name, number: {"a": 2.0, "b": 2.0 + (-1) ** number, "c": 9.0}[name])
    assert len(slow.times["c"]) == 11 < slow.rounds
    assert run(lambda name, _: {"a": 2.0, "b": 1.0, "c": 9.0}[name], least=20).rounds == 20


def test_what_is_not_certain_stays_the_default() -> None:
    """b is faster in the median and in a bit more than half of the rounds: on a busy machine that says nothing."""
    race = run(lambda name, number: {"a": 1.0, "b": 0.5 if number % 9 < 5 else 30.0, "c": 1.0}[name])
    assert race.leader == "b"
    assert (race.winner, race.certain, race.rounds) == ("a", False, MOST)


def test_a_load_that_comes_and_goes_meets_all_alike() -> None:
    """Rounds that take ten times as long, by chance: one form is 5% faster, and found."""
    draw = random.Random(0)
    loads = [draw.choice((1.0, 3.0, 10.0)) for _ in range(MOST)]
    race = run(lambda name, number: {"a": 1.0, "b": 0.95, "c": 1.2}[name] * loads[number])
    assert (race.winner, race.certain) == ("b", True)


def test_noise_alone_has_no_winner() -> None:
    found = 0
    for seed in range(60):
        draw = random.Random(seed)
        found += run(lambda name, _, draw=draw: draw.random()).winner != "a"
    assert found <= 2


def test_one_alone_wins() -> None:
    race = run(lambda name, _: 1.0, "a", least=3)
    assert (race.winner, race.certain, race.rounds) == ("a", True, 3)
    with pytest.raises(ValueError, match="rounds: got 0"):
        Race(["a"], "a", 0)
    with pytest.raises(ValueError, match="default 'd'"):
        Race(["a"], "d", 1)


@pytest.mark.parametrize("busy", [False, True])
def test_tune_by_a_clock(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """On this small map "auto" takes form assembled; shift is made out to be faster, always or now and then."""
    now, calls = [0.0], Counter()
    call = tuning._call

    def timed(layer: sw.ShiftwiseConv2d, x: torch.Tensor, trains: bool) -> None:
        call(layer, x, trains)
        calls[layer.form] += 1
        shift = 9e-3 if busy and calls["shift"] % 2 else 1e-3
        now[0] += shift if layer.form == "shift" else 5e-3

    monkeypatch.setattr(tuning, "_call", timed)
    monkeypatch.setattr(tuning, "clock", lambda: now[0])
    model = sw.convert(nn.Sequential(nn.Conv2d(4, 4, 9, padding=4, groups=4))).eval()
    with torch.no_grad():
        report = sw.tune(model, torch.randn(1, 4, 20, 20))
    (layer,) = report.layers
    assert layer.default == "assembled"
    assert layer.certain is not busy
    assert layer.form == model[0].form == ("auto" if busy else "shift")
    assert layer.rounds == (MOST if busy else 11)
    assert layer.milliseconds["assembled"] == pytest.approx(5)
    shown = str(report)
    assert ("not certain, default kept" in shown) is busy
    assert ("auto (assembled)" in shown) is busy
