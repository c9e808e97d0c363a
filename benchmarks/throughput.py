"""Images per second of whole networks, native against converted: Table 7 of the paper's supplement on this device.

    python benchmarks/throughput.py --json benchmarks/results/throughput.json
    python benchmarks/throughput.py --models slak_tiny sw_tiny --dtypes tf32 --batch 128 --no-compile
    python benchmarks/throughput.py --models slak_tiny --peer my_package.my_module:build

Networks are in eval mode, with random numbers; UniRepLKNet and RepLKNet with their branches folded, as their authors
run them, SLaK as published. float16 and bfloat16 are by autocast. SW has no native form: its rows are its execution
forms, of which "shift" is the paper's own operator, beside the native UniRepLKNet of its size. All candidates of a row
run in turns in one process. A network that computes something else than the native one in float64 is not timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import FORMATS, Clock, Peers, Samples, fastest, median, precision, speedup, unsupported
from networks import (
    COUNTERPART,
    PUBLISHED,
    REFERENCE,
    Judge,
    build_network,
    count_forms,
    is_shiftwise,
    load_peer,
    with_form,
)
from report import (
    Report,
    cudnn_option,
    dtypes_option,
    environment,
    formats_option,
    forms_option,
    parser,
    positive,
    use_device,
)
from torch import Tensor, nn

from sw_transplant import convert
from sw_transplant.forms import FORMS

MODELS = [
    "slak_tiny",
    "slak_small",
    "sw_tiny",
    "sw_tiny.table7",
    "sw_small",
    "sw_small.table7",
    "unireplknet_t",
    "unireplknet_s",
    "replknet_31b",
    "convnext_tiny",
]
JUDGED = 4
"""How many images of a batch are compared."""


def infer(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of a batch."""
    with torch.inference_mode(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return network(x)


def compiled(candidate: str) -> str:
    """What the compiled one of a candidate is called."""
    return f"{candidate} compiled"


class Comparison:
    """One network in all the ways that it is run, on one device and in one memory format.

    Attributes:
        networks: the candidates by name: "native", the forms, "counterpart" (UniRepLKNet for SW), and peers.
        reasons: why some of them could not be built.
        baseline: what the forms are compared with: "native", or the form of the paper's own operator.
    """

    def __init__(self, name: str, options: argparse.Namespace, device: torch.device, layout: str) -> None:
        self.device, self.options = device, options
        self.to = {"memory_format": FORMATS[layout]}
        original = build_network(name, options.size, deploy=True)
        shiftwise = is_shiftwise(original)
        self.baseline = PUBLISHED if shiftwise else "native"
        self.forms = list(options.forms)
        if shiftwise and PUBLISHED not in self.forms:
            self.forms.insert(0, PUBLISHED)
        self.images = torch.randn(JUDGED, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
        double = with_form(original, REFERENCE) if shiftwise else copy.deepcopy(original)
        exact = infer(double.double().to(self.device), self.images.double().to(self.device), torch.float32)
        self.expected = exact.clone()

        builders = {} if shiftwise else {"native": lambda: copy.deepcopy(original)}
        for form in self.forms:
            builders[form] = partial(lambda form: with_form(original if shiftwise else convert(original), form), form)
        if name in COUNTERPART:
            builders["counterpart"] = lambda: build_network(COUNTERPART[name], options.size, deploy=True)
        builders |= {source: partial(load_peer, source) for source in options.peer}
        built = Peers()
        for candidate, build in builders.items():
            built.attempt(candidate, partial(self._enter, candidate, build, built))
        self.networks: dict[str, nn.Module] = built.runs
        self.reasons = built.reasons
        if shiftwise:
            reason = f"it is the paper's own network: form {PUBLISHED} is what it is compared with"
            self.reasons |= dict.fromkeys(["native", "native compiled"], reason)

    def _enter(self, candidate: str, build: Callable[[], nn.Module], built: Peers) -> None:
        built.runs[candidate] = build().to(self.device, **self.to).eval()

    def rows(self, name: str, batch: int) -> list[dict]:
        """A row for every form in one precision."""
        if (reason := unsupported(name, self.device)) is not None:
            return [{"reasons": {"row": reason}}]
        torch.compiler.reset()
        with precision(name) as dtype:
            return self._rows(name, dtype, batch)

    def _rows(self, name: str, dtype: torch.dtype, batch: int) -> list[dict]:
        images = self.images.repeat(-(-batch // JUDGED), 1, 1, 1)[:batch].to(self.device).contiguous(**self.to)
        judge = Judge([self.expected[:batch]])
        peers = Peers()
        peers.reasons |= self.reasons
        for candidate, network in self.networks.items():
            self._start(peers, judge, candidate, network, images, name, dtype)
            if not self.options.compile:
                peers.reasons.setdefault(compiled(candidate), "--no-compile")
            elif candidate in peers.runs:
                mode = {"mode": self.options.compile_mode, "dynamic": False}
                network = peers.attempt(compiled(candidate), partial(torch.compile, network, **mode))
                if network is not None:
                    self._start(peers, judge, compiled(candidate), network, images, name, dtype)
        clock = Clock(self.device, least_ms=20)
        samples = peers.time(clock, self.options.repeats, self.options.seconds)
        return [self._row(form, batch, samples, judge, peers) for form in self.forms]

    def _start(
        self,
        peers: Peers,
        judge: Judge,
        candidate: str,
        network: nn.Module,
        images: Tensor,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        """Compares the logits of a candidate, if it has the numbers of the original, and lets it run for time."""
        run = partial(infer, network, images, dtype)
        logits = peers.attempt(candidate, run)
        if candidate in peers.reasons:
            return
        peers.runs[candidate] = run
        family = candidate.removesuffix(" compiled")
        if family in ("native", *self.forms):
            judge.check(peers, candidate, [logits[:JUDGED]], name, native=self.baseline)

    def _row(self, form: str, batch: int, samples: Samples, judge: Judge, peers: Peers) -> dict:
        ours, base = (form, compiled(form)), (self.baseline, compiled(self.baseline))
        rate = {name: 1e3 * batch / median(samples, name) for name in samples}
        row = {
            "form": form,
            "native": rate.get("native"),
            "native compiled": rate.get(compiled("native")),
            "converted": rate.get(ours[0]),
            "converted compiled": rate.get(ours[1]),
            "ratio": speedup(samples, base[0], ours[0]),
            "compiled ratio": speedup(samples, fastest(samples, base), ours[1]),
            "to UniRepLKNet": speedup(samples, "counterpart", ours[0]),
            "compiled to UniRepLKNet": speedup(
                samples, fastest(samples, ["counterpart", compiled("counterpart")]), ours[1]
            ),
            **{source: rate.get(source) for source in self.options.peer},
            **{compiled(source): rate.get(compiled(source)) for source in self.options.peer},
            "native error": judge.worst(["native", compiled("native")]),
            "error": judge.worst(ours),
        }
        titles = {ours[0]: "converted", ours[1]: "converted compiled"}
        reasons = {titles.get(name, name): reason for name, reason in peers.reasons.items()}
        rounds = {titles.get(name, name): len(times) for name, times in samples.items()}
        others = {name: rate[name] for name in rate if name not in (*row, *ours)}
        ran = count_forms(self.networks[form]) if form in self.networks else None
        return {**row, "layers by form": ran, "other images per second": others, "rounds": rounds, "reasons": reasons}


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options_parser = parser(__doc__, repeats=(30, 5), seconds=5)
    options_parser.add_argument("--models", nargs="+", default=MODELS, help="names in timm, or sw_tiny.table7")
    options_parser.add_argument("--batch", nargs="+", type=positive, help="images; 128, 64, 32 on a GPU, 1 on a CPU")
    options_parser.add_argument("--size", type=positive, default=224, help="of the images (%(default)s)")
    cudnn_option(options_parser)
    dtypes_option(options_parser)
    forms_option(options_parser, [*FORMS, "auto"], ["auto"])
    formats_option(options_parser, list(FORMATS))
    options_parser.add_argument(
        "--peer", action="append", default=[], metavar="MODULE:CALLABLE", help="a network to time beside ours"
    )
    options_parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options_parser.add_argument("--compile-mode", default="default", help="of torch.compile (%(default)s)")
    options = options_parser.parse_args(arguments)
    device = use_device(options.device)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    batches: Sequence[int] = options.batch or ([128, 64, 32] if device.type == "cuda" else [1])

    columns = {"model": 14, "form": 9, "dtype": 5, "batch": 5, "format": 13}
    columns |= dict.fromkeys(["native", "native compiled", "converted", "converted compiled", "ratio"], 9)
    columns |= dict.fromkeys(["compiled ratio", "to UniRepLKNet", "compiled to UniRepLKNet"], 9)
    columns |= {title: 9 for source in options.peer for title in (source, compiled(source))}
    columns |= dict.fromkeys(["native error", "error"], 9)
    report = Report(
        columns, {"environment": environment("throughput.py", arguments, device)}, options.json, options.minutes
    )
    for batch in batches:
        for layout in options.formats:
            for name in options.models:
                measure(report, name, batch, layout, options, device)
    return report.rows


def measure(
    report: Report, name: str, batch: int, layout: str, options: argparse.Namespace, device: torch.device
) -> None:
    """The rows of one network."""
    known = {"model": name, "batch": batch, "format": layout}
    comparison: list[Comparison] = []  # built with the first row that is measured

    def rows(dtype: str) -> list[dict]:
        if not comparison:
            comparison.append(Comparison(name, options, device, layout))
        return comparison[0].rows(dtype, batch)

    for dtype in options.dtypes:
        report.measure({**known, "dtype": dtype}, partial(rows, dtype))


if __name__ == "__main__":
    main()
