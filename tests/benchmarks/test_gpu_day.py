"""Stages end in time, keep what they have, and say what they are; without a GPU nothing begins."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch


@pytest.fixture
def day(load, monkeypatch: pytest.MonkeyPatch):
    module = load("gpu_day")
    monkeypatch.setattr(module, "why_no_gpu", lambda: None)
    monkeypatch.setattr(module, "gpu_name", lambda: "a-gpu")
    monkeypatch.setattr(module, "LEAST_SECONDS", 0.05)
    handler = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, handler)


def stages(day, monkeypatch: pytest.MonkeyPatch, seconds: float = 60, **steps: list) -> None:
    """Stages whose steps are: a string; or code of Python, and the seconds it may take."""

    def made(out: Path, wanted: list) -> list:
        return [
            step if isinstance(step, str) else day.Step(f"step{i}", [sys.executable, "-c", step[0]], step[1])
            for i, step in enumerate(wanted)
        ]

    table = {name: day.Stage(seconds, lambda out, wanted=wanted: made(out, wanted)) for name, wanted in steps.items()}
    monkeypatch.setattr(day, "STAGES", table)


def status(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.status.json").read_text())


def test_without_a_gpu_it_says_so(day, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(day, "why_no_gpu", lambda: "PyTorch sees no GPU here")
    assert day.main(["--output", str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        day.main(["nonsense"])
    assert "got stage 'nonsense', expected some of facts, correct" in capsys.readouterr().err


def test_how_stages_end(day, monkeypatch, tmp_path: Path, capfd) -> None:
    endless = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stages(
        day,
        monkeypatch,
        fine=[("print('hello'); print(3 * 7)", 30)],
        failed=[("import sys; sys.exit(3)", 30), ("print('the next one runs')", 30)],
        late=[(endless, 0.5)],
        missing=["there is no such tool"],
        never=[("print('never')", 30)],
    )
    begin = time.monotonic()
    assert day.main(["fine", "failed", "late", "missing", "--output", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 30
    assert status(tmp_path, "fine")["outcome"] == "fine"
    assert (tmp_path / "fine.txt").read_text().splitlines()[1:3] == ["hello", "21"]
    assert [step["outcome"] for step in status(tmp_path, "failed")["steps"]] == ["exit code 3", "fine"]
    assert status(tmp_path, "late")["steps"][0]["outcome"].startswith("stopped after")
    assert status(tmp_path, "late")["outcome"] == "in part"
    assert status(tmp_path, "missing")["outcome"] == "left out"
    summary = (tmp_path / "summary.md").read_text()
    for line in ("| fine | fine |", "| failed | failed |", "| missing | left out |", "| never | not run |  |  |"):
        assert line in summary
    assert "there is no such tool" in summary
    assert summary in capfd.readouterr().out


def test_time_for_all_together(day, monkeypatch, tmp_path: Path) -> None:
    stages(day, monkeypatch, first=[("import time; time.sleep(60)", 60), ("print(1)", 9)], second=[("print(1)", 9)])
    assert day.main(["--output", str(tmp_path), "--minutes", "0.01"]) == 0
    outcomes = [step["outcome"] for step in status(tmp_path, "first")["steps"]]
    assert outcomes[0].startswith("stopped after")
    assert outcomes[1] == "not run: no time was left"
    assert not (tmp_path / "second.status.json").exists()


def test_what_is_cut_short_keeps_what_it_has(day, monkeypatch, tmp_path: Path) -> None:
    stages(day, monkeypatch, first=[("print('done')", 9), ("import time; time.sleep(60)", 60)], second=[])

    def terminate() -> None:
        log = tmp_path / "first.txt"
        while not log.exists() or "step1, at most" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    assert day.main(["--output", str(tmp_path)]) == 1
    assert [step["outcome"] for step in status(tmp_path, "first")["steps"]] == ["fine", "cut short"]
    assert "| first | cut short |" in (tmp_path / "summary.md").read_text()


def test_every_stage_says_what_it_runs(day, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(day, "tool", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(day.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    described = day.__doc__
    for name, stage in day.STAGES.items():
        steps = stage.steps(tmp_path)
        assert steps, name
        assert f"    {name}  " in described
        assert all(isinstance(step, day.Step) for step in steps), steps
        for step in steps:
            scripts = [word for word in step.command if word.endswith(".py") and "benchmarks" in word]
            assert all(Path(word).is_file() for word in scripts)
    monkeypatch.setattr(day, "tool", lambda name: None)
    assert "no compute-sanitizer" in day.STAGES["sanitize"].steps(tmp_path)[0]
    assert "no ncu" in day.STAGES["profile"].steps(tmp_path)[0]


@pytest.mark.parametrize("stage", ["kernels", "throughput", "training"])
def test_the_options_of_benchmarks_exist(day, load, stage: str, tmp_path: Path, monkeypatch) -> None:
    class Understood(Exception):
        pass

    def use_device(device):
        raise Understood

    module = load(stage)
    monkeypatch.setattr(module, "use_device", use_device)
    for step in day.STAGES[stage].steps(tmp_path):
        assert step.command[1].endswith(f"{stage}.py")
        with pytest.raises(Understood):
            module.main(list(step.command[2:]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_probe_compares_forward_and_gradients(load, monkeypatch, layout: str) -> None:
    probe = load("gpu_probe")
    layer = probe.Layer((2, 3, 9, 8), probe.strips(5, 3))
    found = probe.outcome(layer, torch.float32, 1e-5, layout, "cpu")
    assert max(found["errors"]) < 1e-5
    assert len(found["errors"]) == 4
    assert (found["same bits"], found["kernel"], found["fine"]) == (True, False, False)  # there is no kernel here
    monkeypatch.setattr(probe, "kernel_applies", lambda *_: True)
    monkeypatch.setattr(probe, "weight_grad_kernel_applies", lambda *_: True)
    assert probe.outcome(layer, torch.float32, 1e-5, layout, "cpu")["fine"]
    right = probe.toeplitz_conv
    monkeypatch.setattr(probe, "toeplitz_conv", lambda *given: right(*given) * 1.001)
    assert not probe.outcome(layer, torch.float32, 1e-5, layout, "cpu")["fine"]


def test_the_summary_reads_whatever_is_there(load, tmp_path: Path) -> None:
    summary = load("gpu_summary")
    (tmp_path / "kernels_forward.json").write_text(
        json.dumps({"rows": [{"layer": "slak.0", "native cl": 1.23456, "auto": None, "timed": "kernels"}]})
    )
    (tmp_path / "throughput_broken.json").write_text("{")
    facts = {"seconds": {"first forward": 2.5}, "problems": {"toeplitz": "is wrong"}, "device": "a GPU"}
    (tmp_path / "facts_first.json").write_text(json.dumps({**facts, "microseconds of a call": {"float32": 12.3}}))
    row = {"layer": "a layer", "dtype": "tf32", "errors": [0.5], "fine": False}
    (tmp_path / "correct.json").write_text(json.dumps({"rows": [row, {**row, "fine": True}]}))
    (tmp_path / "tests.xml").write_text('<testsuites><testsuite tests="7" failures="2"/></testsuites>')
    text = summary.write_summary(tmp_path, ["facts"])
    for part in (
        "| slak.0 | 1.23 | kernels |",
        "Nothing was measured.",
        "| first forward | 2.5 |  |",
        "toeplitz: is wrong",
        "1 of 2 layers are right",
        "| a layer | tf32 |",
        "7 tests, 2 failures",
    ):
        assert part in text, text
    assert (tmp_path / "summary.md").read_text() == text
