"""save that is stopped: a killed process, a full disk, a read-only folder. It leaves the old model, or the new one."""

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sw_transplant as sw
from sw_transplant.surgery import io

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes and permissions")

STEPS = 5
"""Calls of save after which a process can be stopped: two written files, two renames, and none of these."""


def model_of(value: float, channels: int = 4) -> nn.Module:
    """A network that gives the value everywhere; those of another value have other layers."""
    size = 7 if value < 0.5 else 9
    convs = [nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels) for _ in range(3)]
    model = nn.Sequential(*convs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        convs[-1].bias.fill_(value)
    return model


def stored(folder: Path, channels: int = 4) -> float:
    """Which of the models of values 0 and 1 lies in the folder: a mixture of them is an error of load."""
    for value in (0.0, 1.0):
        try:
            loaded = sw.load(model_of(value, channels), folder)
        except ValueError:
            continue
        assert torch.equal(loaded(torch.randn(1, channels, 9, 9)), torch.full((1, channels, 9, 9), value))
        return value
    raise AssertionError(f"neither of the two models: {sorted(file.name for file in folder.iterdir())}")


def in_a_child(do: Callable[[], None]) -> int:
    """Does it in a process of its own, which it may kill."""
    child = os.fork()
    if child == 0:
        try:
            do()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("step", range(STEPS))
def test_a_process_killed_at_any_step(tmp_path: Path, step: int) -> None:
    converted = [sw.convert(model_of(value)) for value in (0.0, 1.0)]
    sw.save(converted[0], tmp_path)

    def killed() -> None:
        done = 0

        def count(call: Callable) -> Callable:
            def counted(*args):
                nonlocal done
                if done == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
                return call(*args)

            return counted

        import safetensors.torch

        safetensors.torch.save_file = _with_metadata(count(safetensors.torch.save_file))
        Path.write_text = count(Path.write_text)  # type: ignore[method-assign]
        Path.replace = count(Path.replace)  # type: ignore[method-assign]
        sw.save(converted[1], tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(in_a_child(killed), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert stored(tmp_path) == (0.0 if step < 3 else 1.0)
    sw.save(converted[0], tmp_path)
    assert stored(tmp_path) == 0.0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "sw_config.json"]


def _with_metadata(save_file: Callable) -> Callable:
    return lambda tensors, path, metadata: save_file(tensors, path, metadata)


@pytest.mark.parametrize("kills", [4, pytest.param(300, marks=pytest.mark.exhaustive)])
def test_a_process_killed_at_any_time(tmp_path: Path, kills: int) -> None:
    channels, draw = 256, random.Random(0)
    converted = [sw.convert(model_of(value, channels)) for value in (0.0, 1.0)]
    sw.save(converted[0], tmp_path)

    def saves() -> None:
        while True:
            for model in converted:
                sw.save(model, tmp_path)

    for _ in range(kills):
        child = in_a_child(saves)
        time.sleep(draw.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stored(tmp_path, channels)


def test_a_full_disk(tmp_path: Path) -> None:
    """What a disk without space answers, a limit on the size of files answers too."""
    sw.save(sw.convert(model_of(0.0)), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 100, 3000, 5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(OSError, match=r"save: .*: cannot be written \(.+\); what was there is as it was"):
                sw.save(sw.convert(model_of(1.0)), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may read and not write to, also where root runs the tests."""
    place = Path(tempfile.mkdtemp())
    sw.save(sw.convert(model_of(0.0)), place / "saved")
    (place / "saved" / "model.safetensors").chmod(0o444)  # safetensors keeps it from others
    for path in (place, place / "saved"):
        path.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield place
    finally:
        if user == 0:
            os.seteuid(user)
        for path in (place, place / "saved"):
            path.chmod(0o755)
        shutil.rmtree(place)


def test_a_folder_that_cannot_be_written(read_only: Path) -> None:
    for folder in (read_only / "saved", read_only / "new"):
        with pytest.raises(OSError, match="cannot be written"):
            sw.save(sw.convert(model_of(1.0)), folder)
    assert stored(read_only / "saved") == 0.0
    with pytest.raises(OSError, match=r"[Pp]ermission"):
        sw.verify(
            model_of(0.0), model_of(0.0), torch.randn(1, 4, 9, 9), certificate=read_only / "saved" / "certificate.json"
        )


def test_the_names_that_are_renamed(tmp_path: Path) -> None:
    """The order that load relies on: the description is partial without partial weights only between the renames."""
    sw.save(sw.convert(model_of(1.0)), tmp_path)
    (tmp_path / "sw_config.json").rename(tmp_path / "sw_config.json.partial")
    sw.save(sw.convert(model_of(0.0)), tmp_path / "old")
    shutil.copy(tmp_path / "old" / "sw_config.json", tmp_path)
    assert stored(tmp_path) == 1.0
    (tmp_path / "model.safetensors.partial").write_bytes(b"not yet whole")
    with pytest.raises(ValueError, match="does not fit"):
        sw.load(model_of(1.0), tmp_path)
    assert io.PARTIAL == ".partial"
