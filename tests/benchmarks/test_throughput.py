"""The table of whole networks: candidates, their ratios, peers, and what is empty."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sw_transplant import ShiftwiseConv2d

TINY = [
    "--device",
    "cpu",
    "--size",
    "32",
    "--batch",
    "2",
    "--repeats",
    "1",
    "--seconds",
    "0",
    "--formats",
    "contiguous",
]

PEER = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

def number():
    return 7
"""


@pytest.fixture(scope="module")
def throughput(load):
    return load("throughput")


@pytest.fixture(scope="module")
def networks(load):
    return load("networks")


def test_native_against_converted_and_peers(throughput, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "some_peer.py").write_text(PEER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    compilations = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: compilations.append(options) or network)
    file = tmp_path / "throughput.json"
    good, bad, missing = "some_peer:build", "some_peer:number", "no_such_module:build"
    peers = [word for source in (good, bad, missing) for word in ("--peer", source)]
    arguments = ["--models", "convnext_atto", "--dtypes", "fp32", "tf32", "--json", str(file)]
    rows = throughput.main([*TINY, *arguments, *peers])
    row, no_tf32 = rows
    assert row["model"] == "convnext_atto"
    assert row["form"] == "auto"
    measured = ["native", "native compiled", "converted", "converted compiled", "ratio", "compiled ratio"]
    assert all(row[name] > 0 for name in measured)
    assert row[good] > row["native"], "a single product is faster than a network"
    assert row[f"{good} compiled"] > 0
    assert (row[bad], row[missing], row[f"{bad} compiled"]) == (None, None, None)
    assert "it returned a int" in row["reasons"][bad]
    assert row["reasons"][missing].startswith("ModuleNotFoundError")
    assert row["to UniRepLKNet"] is None
    assert 0 < row["error"] < 1e-5
    assert len(compilations) == 3  # native, converted, and the one peer that there is
    assert all(options == {"mode": "default", "dynamic": False} for options in compilations)
    assert no_tf32["native"] is None
    assert no_tf32["reasons"] == {"row": "TF32 exists on CUDA devices only"}
    assert json.loads(file.read_text())["rows"] == rows


@pytest.mark.exhaustive
def test_what_fails_is_empty_and_has_a_reason(throughput, monkeypatch) -> None:
    def refuse(network: nn.Module, **options) -> nn.Module:
        if any(isinstance(module, ShiftwiseConv2d) for module in network.modules()):
            raise RuntimeError("this compiler knows no shifts")
        return network

    monkeypatch.setattr(torch, "compile", refuse)
    (row,) = throughput.main([*TINY, "--models", "convnext_atto", "--dtypes", "fp32"])
    assert row["native compiled"] > 0
    assert row["converted"] > 0
    assert row["converted compiled"] is None
    assert row["compiled ratio"] is None
    assert row["reasons"] == {"converted compiled": "RuntimeError: this compiler knows no shifts"}
    (row,) = throughput.main([*TINY, "--models", "no_such_network", "--dtypes", "fp32"])
    assert row["converted"] is None
    assert "no_such_network" in row["reasons"]["row"]


@pytest.mark.exhaustive
def test_the_papers_network_in_its_forms(throughput, networks, monkeypatch) -> None:
    monkeypatch.setitem(throughput.COUNTERPART, "sw_tiny", "unireplknet_a")
    shift, auto = throughput.main([*TINY, "--models", "sw_tiny", "--dtypes", "fp32", "--no-compile"])
    assert (shift["form"], auto["form"]) == ("shift", "auto")
    assert shift["ratio"] == 1
    for row in (shift, auto):
        assert row["native"] is None
        assert "the paper's own network" in row["reasons"]["native"]
        assert row["reasons"]["converted compiled"] == "--no-compile"
        assert row["converted"] > 0
        assert row["to UniRepLKNet"] > 0
        assert row["other images per second"]["counterpart"] > 0
        assert 0 < row["error"] < 1e-4


def test_native_networks_are_as_their_authors_run_them(networks) -> None:
    trained, deployed = (networks.build_network("unireplknet_a", 32, deploy=deploy) for deploy in (False, True))
    large = deployed.get_submodule("stages.1.0.dwconv")
    assert type(large) is nn.Conv2d
    assert large.kernel_size == (13, 13)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(deployed(images), trained(images), rtol=1e-3, atol=1e-3)
    slak = networks.build_network("convnext_atto", 32, deploy=True)
    assert not networks.is_shiftwise(slak)
    scales = [p.detach() for name, p in slak.named_parameters() if name.endswith("gamma")]
    assert scales
    assert all(0.5 <= float(p.min()) <= float(p.max()) <= 1.5 for p in scales)


def test_outputs_that_differ_are_refused(load, networks) -> None:
    peers = load("common").Peers()
    peers.runs |= dict.fromkeys(["native", "close", "far", "nan"], lambda: None)
    expected = torch.linspace(1, 2, 5, dtype=torch.float64)
    judge = networks.Judge([expected])
    judge.check(peers, "native", [expected * (1 + 1e-4)], "fp32", native="native")
    judge.check(peers, "close", [expected * (1 + 1.9e-4)], "fp32", native="native")
    judge.check(peers, "far", [expected * (1 + 2.1e-4)], "fp32", native="native")
    judge.check(peers, "nan", [expected * float("nan")], "fp32", native="native")
    assert set(peers.runs) == {"native", "close"}
    assert set(peers.reasons) == {"far", "nan"}
    assert judge.worst(["native", "close"]) == pytest.approx(1.9e-4)
