"""Time of forward and backward, and memory, of blocks and of whole networks in training, native against converted.

    python benchmarks/training.py --json benchmarks/results/training.json
    python benchmarks/training.py --subjects slak_tiny.0 sw_tiny --dtypes bf16 --forms auto assembled

A subject is a network, or one large-kernel layer of it, named by its stage (slak_tiny.0 to slak_tiny.3): in train mode,
with BatchNorm. float16 and bfloat16 are by autocast. SW has no native form: it is compared with form "shift", the
paper's own operator. All candidates of a row run in turns in one process. Outputs and gradients of the input are
compared with the native one's in float64; what is wrong is not timed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import timm
import torch
from common import FORMATS, Clock, Peers, Samples, median, precision, speedup, unsupported
from networks import (
    GRADIENTS,
    PUBLISHED,
    REFERENCE,
    Judge,
    count_forms,
    is_shiftwise,
    refuse_other_form,
    settle,
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

from sw_transplant import ShiftwiseConv2d, convert, inspect_model
from sw_transplant.forms import FORMS

NETWORKS = ["slak_tiny", "sw_tiny"]
SUBJECTS = [*(f"{name}.{stage}" for name in NETWORKS for stage in range(4)), *NETWORKS]
JUDGED = 2
"""How many images the comparison is made on: BatchNorm would mix those of a larger batch."""
NO_PEAK = "not on a CPU"


class Subject(NamedTuple):
    """What is trained: a module in train mode, on the CPU; the shape of one input; whether it is a single layer."""

    module: nn.Module
    shape: tuple[int, ...]
    is_layer: bool


def build_subject(name: str, size: int) -> Subject:
    """A network of timm, or, with a stage behind a dot, the first large-kernel layer of that stage.

    Args:
        name: of the subject.
        size: of the images.

    Raises:
        ValueError: there is no such stage, or no large kernel in it.
    """
    network_name, dot, stage = name.rpartition(".") if name.rpartition(".")[2].isdigit() else (name, "", "")
    torch.manual_seed(0)
    network = settle(timm.create_model(network_name), size).train()
    if not dot:
        return Subject(network, (3, size, size), False)
    if int(stage) >= len(network.stages):
        raise ValueError(f"{name}: stage {stage}, expected 0 to {len(network.stages) - 1}")
    layer = large_kernel(network.stages[int(stage)])
    width, side = network.feature_info[int(stage)]["num_chs"], size // network.feature_info[int(stage)]["reduction"]
    return Subject(layer, (width, side, side), True)


def large_kernel(stage: nn.Module) -> nn.Module:
    """The first layer of a stage that is Shiftwise, or would become so.

    Raises:
        ValueError: there is none.
    """
    for module in stage.modules():
        if isinstance(module, ShiftwiseConv2d):
            return module
    matches = inspect_model(stage).matches
    if not matches:
        raise ValueError(f"no large kernel in this stage:\n{inspect_model(stage)}")
    return stage.get_submodule(matches[0].path)


def step(module: nn.Module, x: Tensor, dtype: torch.dtype, grad: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient of the input if it takes one, and gradients of the parameters."""
    with torch.autocast(x.device.type, dtype, enabled=dtype not in (torch.float32, torch.float64)):
        y = module(x)
    inputs = [x] * x.requires_grad + [p for p in module.parameters() if p.requires_grad]
    return (y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype), allow_unused=True))


def saved_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # holds the tensors: no address comes to mean another one

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            y = module(x)
        nbytes = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    del y
    return nbytes


def peak_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype, grad: Tensor) -> int | str:
    """Most memory during a step, beyond what was taken before it. CUDA only."""
    if x.device.type != "cuda":
        return NO_PEAK
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    step(module, x, dtype, grad)
    torch.cuda.synchronize(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


class Comparison:
    """A subject natively and in every form, on one device and in one memory format."""

    def __init__(self, name: str, size: int, forms: Sequence[str], device: torch.device, layout: str) -> None:
        self.device, self.forms = device, list(forms)
        self.to = {"memory_format": FORMATS[layout]}
        self.module, shape, self.is_layer = build_subject(name, size)
        self.shiftwise = is_shiftwise(self.module)
        self.baseline = PUBLISHED if self.shiftwise else "native"
        if self.shiftwise and PUBLISHED not in self.forms:
            self.forms.insert(0, PUBLISHED)
        reference = with_form(self.module, REFERENCE) if self.shiftwise else copy.deepcopy(self.module)
        reference = reference.double().to(device)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(JUDGED, *shape, generator=generator)
        x = self.images.double().to(device).requires_grad_()
        out = reference(x).detach()
        self.grad = torch.randn(out.shape, generator=generator)
        self.expected = step(reference, x, torch.float64, self.grad.double().to(device))[:2]

    def rows(self, name: str, batch: int, repeats: int, seconds: float) -> list[dict]:
        """A row for every form in one precision."""
        if (reason := unsupported(name, self.device)) is not None:
            return [{"reasons": {"row": reason}}]
        with precision(name) as dtype:
            return self._rows(name, dtype, batch, repeats, seconds)

    def _rows(self, name: str, dtype: torch.dtype, batch: int, repeats: int, seconds: float) -> list[dict]:
        times = -(-batch // JUDGED)
        x, grad = (t.repeat(times, *[1] * (t.dim() - 1))[:batch].to(self.device) for t in (self.images, self.grad))
        x = x.contiguous(**self.to).requires_grad_(self.is_layer)
        if grad.dim() == 4:
            grad = grad.contiguous(**self.to)
        judge = Judge(self.expected, GRADIENTS)
        peers = Peers()
        kept: dict[str, float] = {}
        peak: dict[str, int | str] = {}
        ran: dict[str, dict[str, int]] = {}

        def enter(candidate: str, form: str | None) -> None:
            module = copy.deepcopy(self.module)
            if form is not None:
                module = with_form(module if self.shiftwise else convert(module), form)
            module = module.to(self.device, **self.to)
            images = self.images.to(self.device).clone(**self.to).requires_grad_()
            got = step(module, images, dtype, self.grad.to(self.device))[:2]
            kept[candidate] = saved_bytes(module, x, dtype) / x.nbytes
            peak[candidate] = peak_bytes(module, x, dtype, grad)
            peers.runs[candidate] = partial(step, module, x, dtype, grad)
            judge.check(peers, candidate, got, name, native=self.baseline)
            ran[candidate] = count_forms(module)
            if form is not None and self.is_layer:
                refuse_other_form(peers, candidate, module, form)

        if self.shiftwise:
            peers.reasons["native"] = f"it is the paper's own module: form {PUBLISHED} is what it is compared with"
        else:
            peers.attempt("native", partial(enter, "native", None))
        for form in self.forms:
            peers.attempt(form, partial(enter, form, form))
        samples = peers.time(Clock(self.device, least_ms=20), repeats, seconds)
        rows = [self._row(form, samples, kept, peak, judge, peers) for form in self.forms]
        return [{**row, "layers by form": ran.get(row["form"])} for row in rows]

    def _row(
        self,
        form: str,
        samples: Samples,
        kept: dict[str, float],
        peak: dict[str, int | str],
        judge: Judge,
        peers: Peers,
    ) -> dict:
        right = {"native", form} & samples.keys()
        mib = {c: peak[c] if isinstance(peak[c], str) else peak[c] / 2**20 for c in right}
        names = {"native": "native", form: "converted"}
        return {
            "form": form,
            "native": median(samples, "native"),
            "converted": median(samples, form),
            "ratio": speedup(samples, self.baseline, form),
            "native peak MiB": mib.get("native"),
            "peak MiB": mib.get(form),
            "native kept": kept["native"] if "native" in right else None,
            "kept": kept[form] if form in right else None,
            "native error": judge.worst(["native"]),
            "error": judge.worst([form]),
            "rounds": {names[c]: len(samples[c]) for c in right},
            "reasons": {names[c]: reason for c, reason in peers.reasons.items() if c in names},
        }


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the command; returns the rows of the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options_parser = parser(__doc__, repeats=(20, 5), seconds=5)
    options_parser.add_argument("--subjects", nargs="+", default=SUBJECTS, help="names in timm, or one and a stage")
    options_parser.add_argument("--batch", type=positive, help="images; 64 on a GPU, 2 on a CPU")
    options_parser.add_argument("--size", type=positive, default=224, help="of the images (%(default)s)")
    cudnn_option(options_parser)
    dtypes_option(options_parser)
    forms_option(options_parser, [*FORMS, "auto"], [*FORMS, "auto"])
    formats_option(options_parser, ["contiguous"])
    options = options_parser.parse_args(arguments)
    device = use_device(options.device)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    batch = options.batch or (64 if device.type == "cuda" else JUDGED)

    columns = {"subject": 12, "form": 9, "dtype": 5, "batch": 5, "format": 13, "native": 9, "converted": 9}
    columns |= dict.fromkeys(["ratio", "native peak MiB", "peak MiB", "native kept", "kept"], 9)
    columns |= dict.fromkeys(["native error", "error"], 9)
    head = {"environment": environment("training.py", arguments, device)}
    report = Report(columns, head, options.json, options.minutes)
    for layout in options.formats:
        for name in options.subjects:
            comparison: list[Comparison] = []  # built with the first row that is measured

            def rows(dtype: str, comparison=comparison, name=name, layout=layout) -> list[dict]:
                if not comparison:
                    comparison.append(Comparison(name, options.size, options.forms, device, layout))
                return comparison[0].rows(dtype, batch, options.repeats, options.seconds)

            for dtype in options.dtypes:
                known = {"subject": name, "batch": batch, "format": layout, "dtype": dtype}
                report.measure(known, partial(rows, dtype))
    return report.rows


if __name__ == "__main__":
    main()
