"""Everything that only a GPU can settle, in stages: right or wrong first, then how fast.

Stages run in the order of the table below while time is left, each within its limit; given by name, only those run. A
stage that is cut short keeps what it has, and can be run again by itself. All goes to benchmarks/results/GPU/: files of
JSON, STAGE.txt with what was printed, and summary.md, which is made anew from the files after every stage.

    facts         versions, the device, seconds of the first use of kernels, by a first and by a second process
    correct       real layers against float64, and the tests that need a GPU, in several processes
    sanitize      compute-sanitizer's memcheck, racecheck and synccheck on small launches of every kernel
    kernels       kernels.py, the layers that matter most, forward and backward
    throughput    throughput.py, networks in inference, eager and compiled
    training      training.py, layers and networks
    profile       Nsight Compute on the main kernels
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_summary import write_summary

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 10  # with less than that left, a step is not begun
NO_GPU = 2


class Step(NamedTuple):
    """One command of a stage: its name, the words of it, the seconds it may take, and further variables."""

    name: str
    command: Sequence[str]
    seconds: float
    variables: dict[str, str] = {}  # noqa: RUF012  nobody writes to it


class Stage(NamedTuple):
    """How long a stage may take, and what it runs, given the folder for its files; a string: why a step is missing."""

    seconds: float
    steps: Callable[[Path], list[Step | str]]


def script(name: str, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]


def tool(name: str) -> str | None:
    """A tool of CUDA: on the path, or where its installers put it."""
    found = shutil.which(name)
    places = [Path(place) for place in ("/usr/local", "/opt/nvidia") if Path(place).is_dir()]
    patterns = (f"cuda*/bin/{name}", f"nsight-compute/*/{name}", f"*/{name}")
    return found or next(
        (str(p) for place in places for pattern in patterns for p in sorted(place.glob(pattern))), None
    )


def facts(out: Path) -> list[Step | str]:
    empty = {"SW_TRANSPLANT_CACHE": tempfile.mkdtemp(prefix="sw_transplant_kernels_")}
    return [
        Step("first process", script("gpu_probe.py", "facts", "--json", out / "facts_first.json"), 150, empty),
        Step("second process", script("gpu_probe.py", "facts", "--json", out / "facts_second.json"), 60, empty),
    ]


def correct(out: Path) -> list[Step | str]:
    steps: list[Step | str] = [Step("layers", script("gpu_probe.py", "correct", "--json", out / "correct.json"), 300)]
    if importlib.util.find_spec("pytest") is None:
        return [*steps, "tests: pytest is not installed"]
    jobs = min(8, os.cpu_count() or 1)
    workers = ["-n", str(jobs), "--dist=loadscope"] if importlib.util.find_spec("xdist") else []
    files = ["tests/cuda", "tests/test_runtime_gpu.py", "tests/benchmarks/test_on_gpu.py"]
    junit = f"--junitxml={out / 'tests.xml'}"
    words = ["-m", "pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", junit, *workers, *files]
    return [*steps, Step("tests", [sys.executable, *words], 900)]


def sanitize(out: Path) -> list[Step | str]:
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return ["there is no compute-sanitizer here (it comes with the CUDA toolkit)"]
    # Without PyTorch's cache of memory, an allocation ends where a tensor ends. Our kernels have our name in theirs.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--error-exitcode", "9", "--print-limit", "20", "--kernel-name", "kns=sw_transplant"]
    return [
        Step(check, [sanitizer, "--tool", check, *options, *script("gpu_probe.py", "small")], 200, variables)
        for check in ("memcheck", "racecheck", "synccheck")
    ]


def kernels(out: Path) -> list[Step | str]:
    common = ("--dtypes", "tf32", "fp16", "--seconds", 1, "--repeats", 15, "--formats", "contiguous", "channels_last")
    layers = ("slak.0", "slak.1", "slak.2", "sw.0", "replknet.0", "replknet.1")
    layers += ("unireplknet.1", "unireplknet.2", "convnext.0", "convnext.1")
    forward = ("--forward-only", "--forms", "assembled", "gemm", "toeplitz", "auto", "--minutes", 6)
    backward = ("--backward", "--forms", "toeplitz", "auto", "--minutes", 4)
    return [
        Step(
            "forward",
            script("kernels.py", *common, *forward, "--layers", *layers, "--json", out / "kernels_forward.json"),
            420,
        ),
        Step(
            "backward",
            script(
                "kernels.py", *common, *backward, "--layers", *layers[:2], "replknet.0", "convnext.0",
                "--json", out / "kernels_backward.json",
            ),
            300,
        ),
    ]  # fmt: skip


def throughput(out: Path) -> list[Step | str]:
    if importlib.util.find_spec("timm") is None:
        return ["timm is not installed"]
    common = ("--dtypes", "fp16", "tf32", "--batch", 128, "--repeats", 10, "--seconds", 3, "--formats", "contiguous")
    return [
        Step(
            model,
            script(
                "throughput.py", *common, "--models", model, "--minutes", 6,
                "--json", out / f"throughput_{model}.json",
            ),
            480,
        )
        for model in ("slak_tiny", "sw_tiny", "unireplknet_t", "convnext_tiny")
    ]  # fmt: skip


def training(out: Path) -> list[Step | str]:
    if importlib.util.find_spec("timm") is None:
        return ["timm is not installed"]
    subjects = ("slak_tiny.0", "slak_tiny.1", "slak_tiny.2", "slak_tiny", "sw_tiny")
    common = ("--dtypes", "fp16", "tf32", "--forms", "auto", "assembled", "--batch", 64, "--repeats", 8, "--seconds", 2)
    words = (*common, "--minutes", 8, "--subjects", *subjects, "--json", out / "training.json")
    return [Step("steps", script("training.py", *words), 600)]


def profile(out: Path) -> list[Step | str]:
    ncu = tool("ncu")
    if ncu is None:
        return ["there is no ncu here (it comes with Nsight Compute)"]
    options = [
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--target-processes",
        "all",
        "--set",
        "full",
        "-f",
    ]
    collect = [ncu, *options, "--kernel-name", "regex:.*toeplitz.*", "-o", str(out / "profile")]
    raw = [
        ncu,
        "--import",
        str(out / "profile.ncu-rep"),
        "--page",
        "raw",
        "--csv",
        "--log-file",
        str(out / "profile.csv"),
    ]
    return [Step("collect", [*collect, *script("gpu_probe.py", "launches")], 400), Step("table", raw, 60)]


STAGES = {
    "facts": Stage(240, facts),
    "correct": Stage(1200, correct),
    "sanitize": Stage(600, sanitize),
    "kernels": Stage(720, kernels),
    "throughput": Stage(1920, throughput),
    "training": Stage(600, training),
    "profile": Stage(460, profile),
}


class Cut(Exception):
    """Somebody wants this to end: what runs is stopped, and what there is is written."""


def run_stage(name: str, out: Path, seconds: float) -> str:
    """Runs the steps of a stage within so many seconds; returns how it ended, which STAGE.status.json says, too."""
    begin, results = time.monotonic(), []
    status = out / f"{name}.status.json"

    def note(outcome: str) -> str:
        found = {"stage": name, "outcome": outcome, "seconds": round(time.monotonic() - begin), "steps": results}
        part = status.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(status)
        return outcome

    note("cut short")  # should nobody be left to say so
    with open(out / f"{name}.txt", "w") as log:
        for step in STAGES[name].steps(out):
            if isinstance(step, str):
                results.append({"step": "", "outcome": f"left out: {step}"})
                say(f"== {name}: left out: {step}", log)
                continue
            left = min(step.seconds, seconds - (time.monotonic() - begin))
            if left < LEAST_SECONDS:
                results.append({"step": step.name, "outcome": "not run: no time was left"})
                continue
            say(f"== {name}, {step.name}, at most {left:.0f} s: {' '.join(step.command)}", log)
            started = time.monotonic()
            try:
                outcome = run_step(step, left, log)
            except (Cut, KeyboardInterrupt):
                results.append({"step": step.name, "outcome": "cut short"})
                note("cut short")
                raise
            results.append({"step": step.name, "outcome": outcome, "seconds": round(time.monotonic() - started)})
            say(f"== {name}, {step.name}: {outcome}", log)
            note("cut short")
    outcomes = [result["outcome"] for result in results]
    if any(outcome.startswith("exit") for outcome in outcomes):
        return note("failed")
    if all(outcome == "fine" for outcome in outcomes):
        return note("fine")
    return note("left out" if all(outcome.startswith("left out") for outcome in outcomes) else "in part")


def run_step(step: Step, seconds: float, log: object) -> str:
    """Runs a command, and what it has started, for so long; prints and logs what it says."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.variables}
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    previous = signal.signal(signal.SIGALRM, lambda *_: stop(process))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    begin = time.monotonic()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"), log)
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        stop(process)
    if code and time.monotonic() - begin >= seconds:
        return f"stopped after {seconds:.0f} s"
    return f"exit code {code}" if code else "fine"


def stop(process: subprocess.Popen) -> None:
    """Ends a command with everything that it has started: they are a group of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def say(line: str, log: object) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)  # type: ignore[call-overload]


def why_no_gpu() -> str | None:
    """Why there is nothing to do here; None where there is a GPU that PyTorch can use."""
    import torch

    if torch.cuda.is_available():
        return None
    return "PyTorch sees no GPU here" + ("" if torch.version.cuda else ": it is built without CUDA")


def gpu_name() -> str:
    """The name of the GPU as the name of a folder."""
    import torch

    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; returns 0 where all went well, 1 where something failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all unless given")
    parser.add_argument("--minutes", type=float, help="of all stages together")
    parser.add_argument(
        "--output", type=Path, help="folder; in benchmarks/results/, by the name of the GPU, unless given"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"got stage {unknown[0]!r}, expected some of {', '.join(STAGES)}")
    if (reason := why_no_gpu()) is not None:
        print(f"gpu_day.py: {reason}. It needs a CUDA device of compute capability 8.0 or more.", file=sys.stderr)
        return NO_GPU
    out = options.output or ROOT / "benchmarks" / "results" / gpu_name()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: cut())
    end = time.monotonic() + 60 * (options.minutes or 1e6)
    outcomes = {}
    try:
        for name in options.stages or STAGES:
            left = min(STAGES[name].seconds, end - time.monotonic())
            if left < LEAST_SECONDS:
                print(f"== {name}: not run, no time was left")
                continue
            outcomes[name] = run_stage(name, out, left)
            write_summary(out, list(STAGES))
    except (Cut, KeyboardInterrupt):
        outcomes["cut"] = "failed"
    print(write_summary(out, list(STAGES)))
    return int("failed" in outcomes.values())


def cut() -> None:
    raise Cut


if __name__ == "__main__":
    sys.exit(main())
