"""Conversions in several threads, and inference in others meanwhile: reading one model disturbs no other."""

from __future__ import annotations

import copy
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import sw_transplant
from sw_transplant import NoLargeKernelError, ShiftwiseConv2d
from tests.nasty.building import build, load
from tests.nasty.networks import Network, World, draw


def hammer(*, threads: int = 8, conversions: int = 6, inferences: int = 100) -> list[str]:
    """Converts tame networks in several threads while as many others run networks that nobody converts.

    Args:
        threads: of each kind.
        conversions: in each thread.
        inferences: at least so many, in all; the threads go on until the last conversion is done.

    Returns:
        What went wrong, one line each; empty if nothing did.
    """
    errors: list[str] = []
    networks = [_tame(seed) for seed in range(threads * conversions)]
    originals = [build(load(network), network).eval() for network in networks]
    images = [_images(network) for network in networks]
    with torch.no_grad():
        expected = [net(x) for net, x in zip(originals, images, strict=True)]
    counts = [_count(net) for net in originals]
    start, done = threading.Barrier(2 * threads), threading.Event()
    ran = [0] * threads

    def converts(first: int) -> None:
        for k in range(first, len(networks), threads):
            converted = _convert(originals[k])
            found = sum(isinstance(module, ShiftwiseConv2d) for module in converted.modules())
            if found != counts[k]:
                errors.append(f"network {networks[k].seed}: {found} layers converted, {counts[k]} when alone")
            with torch.no_grad():
                _check(f"network {networks[k].seed}, converted", converted(images[k]), expected[k], errors)

    def infers(first: int) -> None:
        own = copy.deepcopy(originals[first])
        while not done.is_set() or sum(ran) < inferences:
            with torch.no_grad():
                _check(
                    f"network {networks[first].seed}, in another thread", own(images[first]), expected[first], errors
                )
            ran[first] += 1

    def run(work: Callable[[int], None], first: int) -> None:
        start.wait()
        try:
            work(first)
        except Exception:
            errors.append(traceback.format_exc(limit=-2).replace("\n", " "))

    workers = [threading.Thread(target=run, args=(converts, k), daemon=True) for k in range(threads)]
    others = [threading.Thread(target=run, args=(infers, k), daemon=True) for k in range(threads)]
    interval, call = sys.getswitchinterval(), nn.Module.__call__
    sys.setswitchinterval(1e-5)  # so that threads get into each other's way
    try:
        for thread in (*workers, *others):
            thread.start()
        for thread in workers:
            thread.join()
        done.set()
        for thread in others:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if nn.Module.__call__ is not call:
        errors.append("nn.Module.__call__ is not what it was")
    return errors


def _tame(seed: int) -> Network:
    """A drawn network without its habits, at sizes that suit all."""
    network = draw(seed)
    blocks = tuple(replace(block, habits=()) for block in network.blocks)
    return replace(network, habits=(), blocks=blocks, head=False)


def _images(network: Network) -> Tensor:
    generator = torch.Generator().manual_seed(network.seed)
    height, width = World().sizes[0]
    return torch.randn(2, network.channels, 3 * height, 3 * width, generator=generator, dtype=torch.float64)


def _convert(net: nn.Module) -> nn.Module:
    try:
        return sw_transplant.convert(net)
    except NoLargeKernelError:
        return net


def _count(net: nn.Module) -> int:
    return sum(isinstance(module, ShiftwiseConv2d) for module in _convert(net).modules())


def _check(what: str, got: Tensor, expected: Tensor, errors: list[str]) -> None:
    error = float((got - expected).abs().max() / expected.abs().max()) if got.shape == expected.shape else float("inf")
    if not error <= 1e-10:
        errors.append(f"{what}: off by {error:.2g}")
