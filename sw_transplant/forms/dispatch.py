"""Which execution form runs: the one place that decides, and says why.

A form that is asked for runs wherever it can. ``"auto"`` follows a rule that was measured, never taking what was
slower than the original convolution: the rule as a chart, and what it was measured on, are in docs/design/forms.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sw_transplant.forms import FORMS, Call
from sw_transplant.forms.guarantees import Arithmetic, breach, promises
from sw_transplant.geometry import Extent
from sw_transplant.ops.depthwise import is_channels_last
from sw_transplant.ops.toeplitz_formats import takes_channels_last
from sw_transplant.ops.toeplitz_selftest import why_no_kernel
from sw_transplant.ops.tracing import constant_when_traced, is_for_onnx, is_transformed

MATRIX_LIMIT = 128 * 2**20
"""Bytes that the matrices of one layer may take in form "gemm"."""
SMALL_MAP = 14 * 14
"""Positions of the largest map that "auto" takes "gemm" for, on a GPU, and in dtypes that a CPU has no kernels for."""
TINY_MAP = 7 * 7
"""The same on a CPU in dtypes that it has kernels for."""
FEW_IMAGES = 16
"""Images up to which a CPU gains by "gemm"."""
WORTH_PRODUCTS = 2e6
"""Multiplications of one image's forward pass from which on a CPU gains by Toeplitz products in training."""
CONTIGUOUS_COPIES = ", on contiguous copies of channels_last maps"
"""What the reason of a decision ends with where copies are made."""
AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Decision(NamedTuple):
    """The form that runs, and why."""

    form: str
    reason: str


class Conditions(NamedTuple):
    """What the decision depends on beside the layer and the size of the map.

    Attributes:
        device: of the map.
        many: more than ``FEW_IMAGES`` images; not known, and then False, while a compiler traces.
        channels_last: whether the map is laid out so.
        autocast: what autocast computes in here; None while it is off.
        coarse_matmul: float32 convolutions are to be exact, while matrix products may use TF32.
        transformed: within torch.func, forward-mode differentiation or an export to ONNX, which do not see into
            operators of our own.
        deterministic: PyTorch was asked to use deterministic algorithms.
    """

    device: torch.device
    many: bool
    channels_last: bool
    autocast: torch.dtype | None
    coarse_matmul: bool
    transformed: bool = False
    deterministic: bool = False


class Job(NamedTuple):
    """A layer on a map.

    Attributes:
        channels: of the map and of the output.
        call: sizes, stride, dtype.
        kernels: per output the dense kernels that are added up.
        trained: the kernels get a gradient, so that what is made of them serves a single call.
    """

    channels: tuple[int, int]
    call: Call
    kernels: Sequence[Sequence[Extent]]
    trained: bool


def check_form(form: str) -> None:
    """Accepts ``"auto"`` and the names of forms.

    Raises:
        ValueError: no form has this name.
    """
    if form != "auto" and form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected 'auto' or one of {sorted(FORMS)}")


def autocast_of(kind: str) -> torch.dtype | None:
    """What autocast computes in on a kind of device; None while it is off."""
    return torch.get_autocast_dtype(kind) if kind in AUTOCAST and torch.is_autocast_enabled(kind) else None


def cast_of(x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
    """What autocast makes of a map, and what it is: a plan depends on both; None while autocast is off."""
    autocast = autocast_of(x.device.type)
    return None if autocast is None else (autocast, x.dtype)


def conditions(x: Tensor) -> Conditions:
    """The conditions of a call with map ``x``."""
    device = x.device
    kind = device.type
    return Conditions(
        device,
        not torch.compiler.is_compiling() and x.shape[0] > FEW_IMAGES,
        is_channels_last(x),
        autocast_of(kind),
        kind == "cuda" and matmul_is_coarser(),
        is_transformed() or is_for_onnx(),
        is_deterministic(),
    )


@constant_when_traced
def is_deterministic() -> bool:
    """Whether PyTorch was asked to use deterministic algorithms."""
    return torch.are_deterministic_algorithms_enabled()


@constant_when_traced
def matmul_is_coarser() -> bool:
    """Whether float32 convolutions are to be exact, while matrix products may use TF32."""
    backends = torch.backends
    return backends.cuda.matmul.fp32_precision == "tf32" != backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


def check_nonfinite(nonfinite: str) -> None:
    """Accepts ``"anywhere"`` and ``"local"``.

    Raises:
        ValueError: anything else.
    """
    if nonfinite not in ("anywhere", "local"):
        raise ValueError(f"nonfinite: got {nonfinite!r}, expected 'anywhere' or 'local'")


def choose_form(
    requested: str, job: Job, given: Conditions, *, local: bool = False, guarantee: Sequence[str] = ()
) -> Decision:
    """The form that runs a job.

    Args:
        requested: ``"auto"`` or a form.
        job, given: the layer, its map, and the conditions.
        local: with "auto", only forms that keep NaN and infinity where the kernel reaches. That leaves "assembled":
            "shift" keeps them as well, and is slower wherever it was measured.
        guarantee: what the form has to keep to, as in :class:`SWConfig`.

    Returns:
        The form asked for, with "auto" the one of the rule above; "assembled" where that one cannot run.

    Raises:
        ValueError: no form has this name.
        NotImplementedError: the form that was asked for cannot run and ``"no_fallback"`` is guaranteed, or no form
            keeps to a guarantee here.
    """
    check_form(requested)
    decision, promised = _choose(requested, job, given, local), promises(guarantee, given.deterministic)
    if promised and (broken := breach(decision.form, _arithmetic(job, given), promised)):
        decision = _keeping(promised, Decision(decision.form, broken), requested, job, given, local)
    if "no_fallback" in guarantee and requested not in ("auto", decision.form):
        raise NotImplementedError(
            f"ShiftwiseConv2d: form {requested!r} was asked for without fallback, and {decision.reason}; ask for "
            f"another form (set_form), or leave the guarantee 'no_fallback' out"
        )
    return decision


def _keeping(
    promised: Sequence[str], broken: Decision, requested: str, job: Job, given: Conditions, local: bool
) -> Decision:
    """The form that keeps to what is promised where the first choice does not."""
    computed = _arithmetic(job, given)
    others = ["toeplitz", "assembled"] if requested == "auto" and not local else ["assembled"]
    for form in others:
        if form != broken.form and not _obstacle(form, job, given) and not breach(form, computed, promised):
            return Decision(form, f"{broken.form} {broken.reason}")
    left = breach("assembled", computed, promised) or broken.reason
    raise NotImplementedError(
        f"ShiftwiseConv2d: no form keeps to {', '.join(promised)} here: {broken.form} {broken.reason}; assembled {left}"
    )


def _arithmetic(job: Job, given: Conditions) -> Arithmetic:
    return Arithmetic(job.call.dtype, given.device, given.coarse_matmul, given.deterministic)


def _choose(requested: str, job: Job, given: Conditions, local: bool) -> Decision:
    if requested != "auto":
        obstacle = _obstacle(requested, job, given)
        if obstacle:
            return Decision("assembled", f"{requested} {obstacle}")
        return Decision(requested, "asked for" + _copies(requested, job, given))
    if local:
        return Decision("assembled", "keeps NaN and infinity local")
    if given.device.type == "cuda":
        return _on_gpu(job, given)
    if given.device.type == "cpu":
        return _on_cpu(job, given)
    return Decision("assembled", f"nothing was measured on {given.device.type}")


def _obstacle(form: str, job: Job, given: Conditions) -> str:
    """Why a form cannot run a job; empty if it can."""
    call = job.call
    if given.transformed and form in ("shift", "toeplitz"):
        return "is an operator that torch.func, forward-mode differentiation and ONNX do not see into"
    if form == "gemm":
        needed = len(job.kernels) * job.channels[1] * _positions(call.in_size) * _positions(call.out_size)
        needed *= job.call.dtype.itemsize
        return f"would take {needed / 2**20:,.0f} MiB of matrices" if needed > MATRIX_LIMIT else ""
    if form == "toeplitz":
        if call.stride != (1, 1) or call.in_size != call.out_size or job.channels[0] != job.channels[1]:
            return "is for stride 1, outputs of the size of the map and one filter per channel"
        if all(any(kernel.dilation != (1, 1) for kernel in kernels) for kernels in job.kernels):
            return "is for kernels without dilation"
        if given.device.type == "cuda":
            return _no_kernel(call.dtype, given.device)
    return ""


def _no_kernel(dtype: torch.dtype, device: torch.device) -> str:
    return why_no_kernel(device.index) if dtype in KERNEL_DTYPES else f"has no kernel for {dtype}"


def _positions(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _on_gpu(job: Job, given: Conditions) -> Decision:
    area = max(_positions(job.call.in_size), _positions(job.call.out_size))
    too_large = _obstacle("gemm", job, given)
    coarse = given.coarse_matmul and job.call.dtype is torch.float32
    if area <= SMALL_MAP and not too_large and not coarse:
        return Decision("gemm", "small map" + _copies("gemm", job, given))
    obstacle = _obstacle("toeplitz", job, given)
    if obstacle:
        return Decision("assembled", f"toeplitz {obstacle}")
    longest = max(max(kernel.kernel_size) for kernels in job.kernels for kernel in kernels)
    if given.channels_last and job.call.dtype is not torch.float32 and longest <= 7:
        return Decision("assembled", "cuDNN is fast for small kernels in 16 bits and channels_last")
    return Decision("toeplitz", "tensor cores" + _copies("toeplitz", job, given))


def _copies(form: str, job: Job, given: Conditions) -> str:
    """What a decision on a GPU says of a channels_last map that a form is given a contiguous copy of; else nothing."""
    if given.device.type != "cuda" or not given.channels_last:
        return ""
    if form == "toeplitz":
        call, device = job.call, given.device.index
        for kernels in job.kernels:
            sizes = tuple(side for kernel in kernels for side in kernel.kernel_size)
            origins = tuple(side for kernel in kernels for side in kernel.origin)
            if not takes_channels_last(call.dtype, device, job.channels[0], call.in_size, sizes, origins):
                return CONTIGUOUS_COPIES
        return ""
    return CONTIGUOUS_COPIES if form == "gemm" else ""


def _on_cpu(job: Job, given: Conditions) -> Decision:
    area = max(_positions(job.call.in_size), _positions(job.call.out_size))
    extents = [extent for kernels in job.kernels for extent in kernels]
    if job.call.dtype in (torch.float32, torch.bfloat16):
        several = len(extents) > 1 and not given.many
        suits_gemm = area <= TINY_MAP and several and not job.trained and not given.channels_last
    else:
        suits_gemm = area <= (TINY_MAP if job.trained else SMALL_MAP)
    if suits_gemm and not _obstacle("gemm", job, given):
        return Decision("gemm", "small map")
    work = job.channels[1] * _positions(job.call.out_size) * sum(extent.taps for extent in extents)
    if job.trained and work >= WORTH_PRODUCTS and not _obstacle("toeplitz", job, given):
        return Decision("toeplitz", "weight gradient by products of lines")
    return Decision("assembled", "fastest convolution here")
