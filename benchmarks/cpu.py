"""Does a conversion cost anything on a CPU? The models of the acceptance tests and SLaK-T, native against converted.

    python benchmarks/cpu.py --json benchmarks/results/cpu.json
    OMP_WAIT_POLICY=PASSIVE python benchmarks/cpu.py --models SLaK fastvit --seconds 4 --check

The models are those of tests/acceptance.py, in float32, eval mode and torch.inference_mode(), at the first size of
their case; and SLaK-T at 224 x 224 with one image and with eight: once as in sw_transplant.models, and once with the
norms of its authors' code, which keep maps contiguous. Converted with the default settings. Native and
converted run in turns, A B B A; the ratio is the median over the rounds of native over converted: above 1, the
converted one is faster. An output that is wrong is not timed.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from common import FORMATS, Clock, Peers, median, speedup
from networks import Judge, build_network, with_channel_norms
from report import Report, environment, formats_option, parser, positive
from torch import Tensor, nn

from sw_transplant import NoLargeKernelError, convert

ACCEPTANCE = Path(__file__).resolve().parents[1] / "tests" / "acceptance.py"
SLAK, SLAK_HERE = "SLaK-T, its authors' norms", "SLaK-T, sw_transplant.models"
LEAST_RATIO = 0.97
LEAST_SLAK_RATIO = 1.5


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
        name: for the table.
        build: makes it, in eval mode.
        images: seeded noise of a size and a number of images.
        run: the floating-point tensors among a model's outputs.
        size: of the images.
        batch: images.
    """

    name: str
    build: Callable[[], nn.Module]
    images: Callable[[int, int], Tensor]
    run: Callable[[nn.Module, Tensor], list[Tensor]]
    size: int
    batch: int


def acceptance() -> ModuleType:
    """The module tests/acceptance.py of this checkout.

    Raises:
        RuntimeError: it is not there, or what it needs is not installed.
    """
    if not ACCEPTANCE.is_file():
        raise RuntimeError(f"the models are those of {ACCEPTANCE}, which is missing: run this from a checkout")
    spec = importlib.util.spec_from_file_location("benchmark_acceptance", ACCEPTANCE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(f"{ACCEPTANCE.name}: {error}; install what the tests need: pip install '.[test]'") from error
    return module


def subjects(scale: float, batch: int | None) -> list[Subject]:
    """Every model, in the order of the table."""
    table = acceptance()

    def of_case(case: Any) -> Subject:
        def run(model: nn.Module, images: Tensor) -> list[Tensor]:
            return table.tensors_of(case.run(model, images))

        def images(size: int, count: int) -> Tensor:
            return case.images(size, batch=count)

        return Subject(case.name, case.model, images, run, _scaled(case.sizes[0], scale), batch or 1)

    def of_slak(name: str, count: int) -> Subject:
        size = _scaled(224, scale)

        def build() -> nn.Module:
            network = build_network("slak_tiny", size, deploy=False)
            return with_channel_norms(network) if name == SLAK else network

        return Subject(name, build, _noise, lambda model, images: [model(images)], size, count)

    counts = [batch] if batch else [1, 8]
    return [of_case(case) for case in table.CASES] + [of_slak(name, n) for name in (SLAK, SLAK_HERE) for n in counts]


def _scaled(size: int, scale: float) -> int:
    return size if scale == 1 else max(32, 32 * round(size * scale / 32))


def _noise(size: int, batch: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def measure(subject: Subject, layout: str, repeats: int, seconds: float) -> list[dict]:
    """The row of one model."""
    to = {"memory_format": FORMATS[layout]}
    native = subject.build().float()
    images = subject.images(subject.size, subject.batch).float().contiguous(**to)
    with torch.inference_mode():
        judge = Judge(subject.run(copy.deepcopy(native).double(), images.double()))
    peers = Peers()

    def enter(name: str, build: Callable[[], nn.Module]) -> None:
        model = build().to(**to)

        def run() -> list[Tensor]:
            with torch.inference_mode():
                return subject.run(model, images)

        got = run()
        peers.runs[name] = run
        judge.check(peers, name, got, "fp32", native="native")

    peers.attempt("native", partial(enter, "native", lambda: copy.deepcopy(native)))
    peers.attempt("converted", partial(enter, "converted", lambda: convert(native)))
    samples = peers.time(Clock(torch.device("cpu"), least_ms=5), repeats, seconds)
    row = {
        "native": median(samples, "native"),
        "converted": median(samples, "converted"),
        "ratio": speedup(samples, "native", "converted"),
        "rounds": len(samples.get("converted", [])),
        "native error": judge.worst(["native"]),
        "error": judge.worst(["converted"]),
        "reasons": peers.reasons,
    }
    return [row]


def shortfalls(rows: list[dict]) -> list[str]:
    """What ``--check`` objects to: ratios that are too low, and models that could not be measured."""
    found = []
    for row in rows:
        where = f"{row['model']}, {row['size']}, batch {row['batch']}, {row['format']}"
        least = LEAST_SLAK_RATIO if row["model"] == SLAK else LEAST_RATIO
        if row["ratio"] is not None and row["ratio"] < least:
            found.append(f"{where}: ratio {row['ratio']:.3f}, expected at least {least}")
        elif row["ratio"] is None and not nothing_to_convert(row):
            found.append(f"{where}: no ratio: {row['reasons']}")
    return found


def nothing_to_convert(row: dict) -> bool:
    """Whether the default settings leave the model as it is."""
    return row.get("reasons", {}).get("converted", "").startswith(NoLargeKernelError.__name__)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table.

    Raises:
        SystemExit: 1 with ``--check``, if :func:`shortfalls` finds any; 2 for bad options.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options_parser = parser(__doc__, repeats=(1000, 1000), seconds=3, device=False)
    options_parser.add_argument("--models", nargs="+", default=[""], help="only those whose names contain one of these")
    options_parser.add_argument("--batch", type=positive, help="images; 1, and for SLaK-T 1 and 8")
    options_parser.add_argument("--size-scale", type=float, default=1, help="of all sizes, to multiples of 32")
    formats_option(options_parser, list(FORMATS))
    options_parser.add_argument("--check", action="store_true", help="exit with 1 if a ratio is too low")
    options = options_parser.parse_args(arguments)
    try:
        chosen = [s for s in subjects(options.size_scale, options.batch) if any(m in s.name for m in options.models)]
    except RuntimeError as error:
        options_parser.error(str(error))
    if not chosen:
        options_parser.error(f"--models {' '.join(options.models)}: no model has such a name")

    columns = {"model": 52, "size": 5, "batch": 5, "format": 13, "native": 9, "converted": 9, "ratio": 6, "rounds": 6}
    columns |= {"native error": 9, "error": 9}
    head = {"environment": environment("cpu.py", arguments, torch.device("cpu"))}
    report = Report(columns, head, options.json, options.minutes)
    for subject in chosen:
        for layout in options.formats:
            known = {"model": subject.name, "size": subject.size, "batch": subject.batch, "format": layout}
            report.measure(known, partial(measure, subject, layout, options.repeats, options.seconds))

    measured = [row for row in report.rows if row["ratio"] is not None]
    if measured:
        lowest = min(measured, key=lambda row: row["ratio"])
        print(f"lowest ratio: {lowest['ratio']:.3f}, {lowest['model']}, {lowest['format']}")
    print(f"below {LEAST_RATIO}: {sum(row['ratio'] < LEAST_RATIO for row in measured)} of {len(measured)}")
    if options.check and (found := shortfalls(report.rows)):
        print(*found, sep="\n", file=sys.stderr)
        raise SystemExit(1)
    return report.rows


if __name__ == "__main__":
    main()
