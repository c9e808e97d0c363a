"""Damaged and hostile files: load, load_checkpoint, SWConfig.from_dict and certificates refuse them, or read them.

Whatever a file holds, the outcome is a model (or a configuration, a certificate) or a ValueError that names the file;
nothing stored in it runs, and what is reserved stays within a bound that the size of the file sets. A quick run draws
some hundred files, ``make test-all`` 100,000. ``SW_FUZZ_SEED`` draws others; a failure names its seed.
"""

import argparse
import json
import os
import pickle
import random
import resource
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sw_transplant as sw
from sw_transplant.check.certificate import Certificate
from sw_transplant.models import load_checkpoint
from tests.fuzz.damage import as_text, damage_bytes, damage_values

SEED = int(os.environ.get("SW_FUZZ_SEED", "0"))
QUICK, LONG = 60, 20_000  # of each of five targets
AMOUNTS = [QUICK, pytest.param(LONG, marks=pytest.mark.exhaustive)]
SPARE = 512 * 2**20
"""Bytes of address space that reading a file of some kilobytes may take beside what the process has."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 9, padding=4, groups=4), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)
    )


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Reserving more than ``SPARE`` fails inside."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(amount: int, name: str, one: Callable[[random.Random], str]) -> Counter[str]:
    """So many cases, each by a seed of its own; what was refused and what was read."""
    counts: Counter[str] = Counter()
    with bounded_memory():
        for number in range(amount):
            seed = f"{name} {SEED} {number}"
            try:
                one(random.Random(seed))
                counts["read"] += 1
            except (ValueError, NotImplementedError) as error:
                counts["refused"] += 1
                if not 10 < len(str(error)) < 5000:
                    raise AssertionError(f"{seed}: a message of {len(str(error))} characters") from error
            except Exception as error:
                raise AssertionError(f"{seed}: {type(error).__name__}: {error}") from error
    print(f"{name}: {dict(counts)}")
    return counts


@pytest.fixture(scope="module", params=["laid_out", "shiftwise"])
def folder(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    sw.save(sw.convert(network(), sw.SWConfig(mode=request.param)), place)
    return place


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("what", ["sw_config.json", "model.safetensors"])
def test_load(folder: Path, tmp_path: Path, what: str, amount: int) -> None:
    base, inputs = network(), torch.randn(1, 3, 11, 11)
    texts = {name: (folder / name).read_bytes() for name in ("sw_config.json", "model.safetensors")}
    description = json.loads(texts["sw_config.json"])
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)

    def one(draw: random.Random) -> str:
        if what == "sw_config.json" and draw.random() < 0.7:
            content = as_text(damage_values(description, draw), draw).encode()
        else:
            content = damage_bytes(texts[what], draw)
        (tmp_path / what).write_bytes(content)
        model = sw.load(base, tmp_path)
        assert model.state_dict().keys() == sw.load(network(), folder).state_dict().keys() or what == "sw_config.json"
        return str(model.eval()(inputs).shape)

    counts = run(amount, f"load {folder.name} {what}", one)
    assert counts["refused"] > amount / 3
    assert [type(module) for module in base] == [type(module) for module in network()]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_load_checkpoint(tmp_path: Path, suffix: str, amount: int) -> None:
    model, whole, file = network(), network().state_dict(), tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"model": whole, "args": argparse.Namespace(lr=0.1)}, file)
    else:
        save_file(whole, file)
    content = file.read_bytes()

    def one(draw: random.Random) -> str:
        file.write_bytes(damage_bytes(content, draw))
        load_checkpoint(model, file)
        return ""

    assert run(amount, f"load_checkpoint {suffix}", one)["refused"] > amount / 3
    assert model.state_dict().keys() == whole.keys()
    assert all(tensor.shape == whole[name].shape for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("amount", AMOUNTS)
def test_config(amount: int) -> None:
    def one(draw: random.Random) -> str:
        config = sw.SWConfig.from_dict(damage_values(sw.SWConfig().to_dict(), draw))
        assert sw.SWConfig.from_dict(config.to_dict()) == config
        json.dumps(config.to_dict(), allow_nan=False)
        return str(config)

    assert run(amount, "config", one)["refused"] > amount / 3


@pytest.mark.parametrize("amount", AMOUNTS)
def test_certificate(tmp_path: Path, amount: int) -> None:
    file, model = tmp_path / "certificate.json", network()
    sw.verify(model, sw.convert(model), input_size=12, batch_size=1, certificate=file)
    content = file.read_bytes()
    whole = json.loads(content)

    def one(draw: random.Random) -> str:
        if draw.random() < 0.5:
            file.write_text(as_text(damage_values(whole, draw), draw))
        else:
            file.write_bytes(damage_bytes(content, draw))
        assert Certificate.read(file).values == whole  # whatever is read is what was written
        return ""

    assert run(amount, "certificate", one)["refused"] > amount / 2


# ---- files that are made to harm


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip", "named safetensors"])
def test_nothing_that_is_stored_runs(tmp_path: Path, kind: str) -> None:
    trap, model = tmp_path / "trap", network()
    file = tmp_path / ("weights.safetensors" if kind == "named safetensors" else "weights.pth")
    if kind == "torch":
        torch.save({"model": model.state_dict(), "args": Harm(trap)}, file)
    elif kind == "zip":
        torch.save(model.state_dict(), file)
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, pickle.dumps(Harm(trap)) if name.endswith("data.pkl") else content)
    else:
        file.write_bytes(pickle.dumps(Harm(trap)))
    with pytest.raises(ValueError, match=r"weights\.(pth|safetensors): cannot be read"):
        load_checkpoint(model, file)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Harm(trap)))
    (tmp_path / "sw_config.json").write_bytes(pickle.dumps(Harm(trap)))
    (tmp_path / "certificate.json").write_bytes(pickle.dumps(Harm(trap)))
    with pytest.raises(ValueError, match="damaged"):
        sw.load(model, tmp_path)
    with pytest.raises(ValueError, match="damaged"):
        Certificate.read(tmp_path / "certificate.json")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Harm(trap)))  # it would have
    assert trap.exists()
