"""Compiling every kernel ahead of the calls that need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sw_transplant.cuda.compiler import compile_together
from sw_transplant.cuda.launch import left_out


def warm_up(model: nn.Module, *args: Any, processes: int | None = None, **kwargs: Any) -> int:
    """Compiles all CUDA kernels that a call of a model needs, in several processes, and loads them.

    For CUDA graphs, servers and benchmarks: the first call then takes no longer than the others. The model is called
    twice: first without the kernels that are still to be compiled, to learn which these are, then with them. In train
    mode, with gradients enabled, gradients of the sum of all outputs are computed, too. Parameters and their gradients
    are not touched; buffers and random state are afterwards what they were. What is compiled is kept on disk for other
    processes (docs/performance.md); where nothing is kept, the second call compiles one kernel after the other. On a
    CPU there is nothing to compile, and the model is called all the same.

    Args:
        model: any model, with converted layers or without.
        args, kwargs: of a call: device, dtype, sizes and autocast as in the calls to come.
        processes: how many compile at once; by default one for each core, up to eight.

    Returns:
        How many kernels were not on disk.

    Example:
        >>> import sw_transplant as sw
        >>> sw.warm_up(nn.Conv2d(8, 8, 7, groups=8), torch.zeros(1, 8, 20, 20))
        0
    """
    with _state_kept(model):
        with left_out() as jobs:
            _call(model, args, kwargs)
        compile_together(list(jobs), processes)
        _call(model, args, kwargs)
    return len(jobs)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outputs = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
    sums = [output.sum() for output in outputs if output.requires_grad]
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wanted = [tensor for tensor in (*model.parameters(), *inputs) if tensor.requires_grad]
    if model.training and sums and wanted:
        torch.autograd.grad(sums, wanted, allow_unused=True)
    for device in {output.device for output in outputs if output.is_cuda}:
        torch.cuda.synchronize(device)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers and random state are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
