"""Compiled kernels on disk: whole or not there, for one environment, whoever else reads and writes."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from sw_transplant.cuda import storage
from sw_transplant.cuda.sources import Factory, Job
from sw_transplant.cuda.storage import Cubin

ROOT = Path(__file__).resolve().parents[2]
JOB = Job(Factory("somewhere", "some_source"), ("tf32", (56, 56)), (9, 0))
CUBIN = Cubin("entry", "ppi", bytes(range(256)) * 100)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is not there yet."""
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", str(tmp_path / "a" / "kernels"))
    return tmp_path / "a" / "kernels"


def python(code: str) -> subprocess.Popen:
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_was_written_is_read(kept: Path) -> None:
    assert storage.read(JOB) is None
    storage.write(JOB, CUBIN)
    assert storage.read(JOB) == CUBIN
    assert len(list(kept.iterdir())) == 1
    (entry,) = storage.entries()
    assert (entry.architecture, entry.whole, entry.size > len(CUBIN.image)) == ("sm_90", True, True)
    assert entry.kernel == "some: tf32 (56, 56)"


@pytest.mark.parametrize(
    "other",
    [
        JOB._replace(key=("tf32", (56, 57))),
        JOB._replace(capability=(8, 0)),
        JOB._replace(factory=Factory("somewhere", "another_source")),
        JOB._replace(factory=Factory("elsewhere", "some_source")),
    ],
    ids=["plan", "architecture", "kernel", "module"],
)
def test_another_kernel_is_another_file(other: Job) -> None:
    storage.write(JOB, CUBIN)
    assert storage.read(other) is None


@pytest.mark.parametrize("what", ["driver", "sources", "numba-cuda"])
def test_another_environment_finds_nothing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage._environment.cache_clear()
    storage.write(JOB, CUBIN)
    storage._environment.cache_clear()
    if what == "driver":
        monkeypatch.setattr(storage.driver, "version", lambda: 12345)
    elif what == "sources":
        monkeypatch.setattr(storage, "_sources", lambda: "other sources")
    else:
        monkeypatch.setattr(storage.importlib.metadata, "version", lambda name: "0.0")
    assert storage.read(JOB) is None
    storage._environment.cache_clear()
    monkeypatch.undo()


def test_every_kernel_source_counts() -> None:
    before = storage._sources()
    room = Path(storage.__file__).parent
    assert {"intrinsics.py", "plan.py", "emit.py"} <= {path.name for path in room.rglob("*.py")}
    assert before == storage._sources() != ""


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "header", "entry", "no text", "another format"])
def test_a_damaged_file_is_as_if_it_were_not_there(damage: str, kept: Path) -> None:
    storage.write(JOB, CUBIN)
    (path,) = kept.iterdir()
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut short": data[:-1],
            "one bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
            "empty": b"",
            "header": storage.MAGIC + b'{"entry": 1}\n',
            "entry": data.replace(b'"entry": "entry"', b'"entry": "other"'),
            "no text": storage.MAGIC + b"\xff\xfe\n",
            "another format": data.replace(b"kernel 1", b"kernel 2"),
        }[damage]
    )
    assert storage.read(JOB) is None
    assert [entry.whole for entry in storage.entries()] == [False]
    storage.write(JOB, CUBIN)  # compiled anew
    assert storage.read(JOB) == CUBIN
    assert len(list(kept.iterdir())) == 1


WRITE = """
import sys
import sw_transplant.cuda.shift_add, sw_transplant.cuda.toeplitz
from tests.cuda.test_storage import CUBIN, JOB, storage
assert storage.read(JOB) == CUBIN
assert not {"numba", "llvmlite", "cuda.core"} & set(sys.modules)
for _ in range(200):
    storage.write(JOB, CUBIN)
"""


def test_other_processes_read_without_numba_and_write_at_the_same_time(kept: Path) -> None:
    storage.write(JOB, CUBIN)
    writers = [python(WRITE) for _ in range(2)]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        assert storage.read(JOB) == CUBIN
        reads += 1
        time.sleep(0.001)
    assert [writer.wait() for writer in writers] == [0, 0], [writer.communicate() for writer in writers]
    assert reads > 10
    assert len(list(kept.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_costs_one_warning(kept: Path) -> None:
    kept.parent.write_text("a file where a folder should be")
    storage._complain.cache_clear()
    with pytest.warns(RuntimeWarning, match="cannot be kept.*SW_TRANSPLANT_CACHE"):
        storage.write(JOB, CUBIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage.write(JOB, CUBIN)
    assert storage.read(JOB) is None
    assert storage.entries() == []
    assert storage.clear() == 0


def test_nothing_is_kept_where_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SW_TRANSPLANT_CACHE", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage.write(JOB, CUBIN)
    assert storage.folder() is None
    assert storage.read(JOB) is None
    assert storage.entries() == []


def test_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("platformdirs")
    monkeypatch.delenv("SW_TRANSPLANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = storage.folder()
    assert place is not None
    assert place.parts[-2:] == ("sw_transplant", "kernels")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert storage.folder() is None


def test_clearing_leaves_what_is_not_ours(kept: Path) -> None:
    storage.write(JOB, CUBIN)
    storage.write(JOB._replace(capability=(8, 0)), CUBIN)
    (kept / f"interrupted{storage.PART}").write_bytes(b"half")
    (kept / "notes.txt").write_text("mine")
    assert storage.clear() == 3
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
