"""Peers take turns, failures stay where they happen, and the file is whole after every row."""

import json
import math

import pytest
import torch


@pytest.fixture(scope="module")
def common(load):
    return load("common")


@pytest.fixture(scope="module")
def report(load):
    return load("report")


class Stub:
    """A clock that runs a call once and takes its return value for the time."""

    timed = "kernels"

    def calls(self, function) -> int:
        return 1

    def __call__(self, function, calls: int = 1) -> float:
        return function()


def test_peers_take_turns_forth_and_back(common) -> None:
    calls = []
    peers = common.Peers()
    for name, ms in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        peers.runs[name] = lambda name=name, ms=ms: calls.append(name) or ms * len(calls)
    samples = peers.time(Stub(), repeats=2, seconds=0)
    assert "".join(calls) == "abccba" * 2
    # Each is called at the same mean time within a round: drift leaves the ratios alone.
    assert samples == {"a": [3.5, 9.5], "b": [7.0, 19.0], "c": [14.0, 38.0]}
    assert common.speedup(samples, "c", "a") == 4
    assert common.median(samples, "b") == 13
    assert common.fastest(samples, ["c", "b", "missing"]) == "b"


def test_rounds_end_when_time_is_up_but_not_before_three(common) -> None:
    peers = common.Peers()
    peers.runs["a"] = lambda: 1.0
    assert len(peers.time(Stub(), repeats=100, seconds=0)["a"]) == common.LEAST_ROUNDS == 3


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_peer_that_fails_leaves_and_the_others_stay(common, after: int) -> None:
    calls = []

    def failing() -> float:
        calls.append(1)
        if len(calls) > after:
            raise torch.OutOfMemoryError("no room\nfor this")
        return 1.0

    peers = common.Peers()
    peers.runs |= {"bad": failing, "good": lambda: 1.0}
    samples = peers.time(Stub(), repeats=5, seconds=0)
    assert samples == {"good": [1.0] * 3}
    assert peers.reasons == {"bad": "OutOfMemoryError: no room for this"}
    assert common.speedup(samples, "bad", "good") is None
    assert common.median(samples, "bad") is None
    assert common.fastest(samples, ["bad"]) is None


def test_the_clock_counts_milliseconds_of_one_call(common) -> None:
    clock = common.Clock(torch.device("cpu"), least_ms=5)
    seen = []
    function = lambda: seen.append(1) or torch.randn(100_000)  # noqa: E731
    count = clock.calls(function)
    assert count >= 1
    seen.clear()
    assert 0 < clock(function, 3) < 1000
    assert len(seen) == 3


class Gpu:
    """A GPU that reaches an event once so many flushes less than were queued before it are done."""

    def __init__(self, enough: int) -> None:
        self.enough, self.flushes, self.before = enough, 0, 0

    def zero_(self) -> None:
        self.flushes += 1

    def Event(self, enable_timing: bool):
        gpu = self

        class Event:
            def record(self) -> None:
                self.flushes, gpu.flushes = gpu.flushes, 0

            def query(self) -> bool:
                return self.flushes < gpu.enough

            def elapsed_time(self, end) -> float:
                return float(self.flushes)

        return Event()


@pytest.mark.parametrize(
    ("enough", "flushes", "timed"), [(3, 4, "kernels"), (27, 32, "kernels"), (5000, 1024, "with Python")]
)
def test_a_call_is_queued_behind_flushes_that_take_longer(common, monkeypatch, enough, flushes, timed) -> None:
    gpu = Gpu(enough)
    monkeypatch.setattr(torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    clock = common.Clock(torch.device("cpu"))
    clock.cold, clock._flush = True, gpu
    peers = common.Peers()
    peers.runs["a"] = lambda: None
    samples = peers.time(clock, repeats=3, seconds=0)
    assert samples["a"][-1] == flushes
    assert common.what_was_timed(peers.timed) == timed


def test_python_in_one_time_is_said_of_the_row(common) -> None:
    assert common.what_was_timed({"a": "kernels", "b": "with Python"}) == "with Python"
    assert common.what_was_timed({"a": "kernels"}) == "kernels"
    assert common.what_was_timed({}) is None


def test_precisions_set_tf32_and_put_it_back(common) -> None:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for name, expected in (("tf32", True), ("fp32", False), ("bf16", False)):
        with common.precision(name) as dtype:
            assert [backend.allow_tf32 for backend in backends] == [expected] * 2
            assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is expected
            assert dtype == common.PRECISIONS[name]
        assert [backend.allow_tf32 for backend in backends] == before
    assert common.unsupported("tf32", torch.device("cpu"))
    assert common.unsupported("bf16", torch.device("cpu")) is None


def test_rates_are_bytes_and_operations_by_time(common) -> None:
    class Constant(Stub):
        device = torch.device("cpu")

        def __call__(self, function, calls: int = 1) -> float:
            return 2.0

    assert common.copy_rate(Constant(), 1) == 2 * 4 * 2**25 / 2e-3
    assert common.product_rate(Constant(), 1, torch.float32) == 2 * 1024**3 / 2e-3


def test_a_report_prints_and_writes_row_by_row(report, tmp_path, capsys) -> None:
    file = tmp_path / "new" / "results.json"
    table = report.Report({"name": 6, "a": 8, "b": 8}, {"environment": {}}, file)
    table.measure({"name": "first"}, lambda: [{"a": 1234.5678}, {"a": 0.00012345, "b": math.nan, "more": [1]}])
    assert json.loads(file.read_text())["rows"] == [
        {"name": "first", "a": 1234.5678, "b": None},
        {"name": "first", "a": 0.00012345, "b": "nan", "more": [1]},
    ]
    table.measure({"name": "second"}, lambda: 1 / 0)
    written = json.loads(file.read_text())
    assert written["rows"][2] == {
        "name": "second",
        "a": None,
        "b": None,
        "reasons": {"row": "ZeroDivisionError: division by zero"},
    }
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["name", "a", "b"],
        ["first", "1235", "-"],
        ["first", "0.000123", "nan"],
        ["second", "-", "-"],
    ]
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_rows_that_time_was_too_short_for_say_so(report) -> None:
    table = report.Report({"a": 3}, {}, None, minutes=0)
    table.measure({}, lambda: pytest.fail("measured after the end"))
    assert table.rows == [{"a": None, "reasons": {"row": "not measured: --minutes 0 had gone by"}}]


def test_the_environment_names_device_versions_and_command(report) -> None:
    found = report.environment("kernels.py", ["--layers", "a b"], torch.device("cpu"))
    assert found["command"] == "python benchmarks/kernels.py --layers 'a b'"
    assert found["torch"] == torch.__version__
    for name in ("device", "date", "sw-transplant", "numba", "timm", "threads", "cores", "python", "platform"):
        assert found[name], name
