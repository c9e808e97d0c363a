"""What a form keeps to: arithmetic no coarser than the original's, and the same bits in every run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS gives the same bits in every run."""


class Arithmetic(NamedTuple):
    """What a call computes in.

    Attributes:
        dtype, device: of the map and the kernels.
        coarse_matmul: float32 convolutions are to be exact, while matrix products may use TF32.
        deterministic: PyTorch was asked to use deterministic algorithms.
    """

    dtype: torch.dtype
    device: torch.device
    coarse_matmul: bool
    deterministic: bool


def promises(guarantee: Sequence[str], deterministic: bool) -> tuple[str, ...]:
    """The guarantees that a form has to keep to: those of the layer, and what PyTorch was asked for."""
    asked = {"deterministic"} if deterministic else set()
    return tuple(sorted(asked | (set(guarantee) & {"deterministic", "exact"})))


def breach(form: str, given: Arithmetic, promised: Sequence[str]) -> str:
    """Why a form does not keep to what is promised; empty if it does."""
    if "exact" in promised and (reason := _coarser(form, given)):
        return reason
    return _varying(form, given) if "deterministic" in promised else ""


def _coarser(form: str, given: Arithmetic) -> str:
    """Why a form rounds more than a convolution in the same dtype, which adds up in float32 or wider."""
    dtype, cuda = given.dtype, given.device.type == "cuda"
    small = dtype in (torch.float16, torch.bfloat16)
    if form == "shift" and small:
        return f"rounds the response of every tile to {str(dtype).removeprefix('torch.')}"
    if form == "gemm" and cuda and dtype is torch.float32 and given.coarse_matmul:
        return "multiplies in TF32, which convolutions do not"
    if form == "gemm" and cuda and small and _adds_in_16_bits(dtype):
        return "may add in 16 bits"
    if form == "toeplitz" and cuda and dtype is torch.float32:
        return "multiplies float32 in parts, and leaves the smallest out"
    products = form in ("gemm", "toeplitz") and not cuda and dtype is torch.float32
    if products and torch.get_float32_matmul_precision() != "highest":
        return "multiplies matrices in fewer bits than float32 has"
    return ""


def _adds_in_16_bits(dtype: torch.dtype) -> bool:
    matmul = torch.backends.cuda.matmul
    name = "fp16" if dtype is torch.float16 else "bf16"
    return bool(getattr(matmul, f"allow_{name}_reduced_precision_reduction"))


def _varying(form: str, given: Arithmetic) -> str:
    """Why a form may give other bits in another run. The kernels of this package, and all on a CPU, do not."""
    if given.device.type != "cuda":
        return ""
    if form == "gemm" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in REPEATABLE_WORKSPACES:
        return "is repeatable with CUBLAS_WORKSPACE_CONFIG=:4096:8 only"
    if form == "assembled" and not (given.deterministic or torch.backends.cudnn.deterministic):
        return "is repeatable with torch.backends.cudnn.deterministic = True only"
    return ""
