"""Judgements in processes of their own: one that hangs, or dies, or leaves PyTorch broken, harms no other."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo

from tests.nasty.judge import judge
from tests.nasty.networks import Network
from tests.nasty.smaller import simpler
from tests.nasty.source import source
from tests.nasty.verdict import Verdict


def judge_all(networks: Iterable[Network], *, jobs: int = 1, limit: float = 30.0) -> Iterator[Verdict]:
    """Judges each network in a forked process of its own, and yields the verdicts as they come.

    Args:
        networks: any number.
        jobs: how many processes at a time.
        limit: seconds that each may take; then it is killed, and the verdict is "hang".
    """
    for network, result in run_all(networks, lambda network, note: judge(network, note=note), jobs=jobs, limit=limit):
        if isinstance(result, Verdict):
            yield result
        else:
            outcome, where, what = result
            yield Verdict(network.seed, outcome, where, what, habits=[one.name for one in network.all_habits])


def shrink_all(
    failures: Iterable[tuple[Network, Verdict]], *, jobs: int = 1, limit: float = 60.0
) -> Iterator[tuple[int, Network]]:
    """For each network that failed its seed, and the smallest network found that fails alike.

    Args:
        failures: networks and how they failed.
        jobs: how many processes at a time.
        limit: seconds for each.
    """
    of_seed = {network.seed: (network, verdict) for network, verdict in failures}

    def work(network: Network, note: Callable[[str], None]) -> Network:
        return shrink(network, of_seed[network.seed][1], until=time.monotonic() + 0.7 * limit)

    for network, result in run_all((network for network, _ in of_seed.values()), work, jobs=jobs, limit=limit):
        yield network.seed, result if isinstance(result, Network) else network


def shrink(network: Network, verdict: Verdict, *, until: float) -> Network:
    """Leaves out whatever can be left out while the outcome, and the kind of comparison, stay the same.

    Args:
        network: one that failed.
        verdict: how.
        until: moment on the monotonic clock at which it is small enough.
    """
    smaller = True
    while smaller and time.monotonic() < until:
        smaller = False
        for other in simpler(network):
            if time.monotonic() > until:
                break
            if len(source(other)) >= len(source(network)):
                continue
            found = judge(other, steps=verdict.steps + 1)
            if found.outcome == verdict.outcome and found.kind == verdict.kind:
                network, smaller = other, True
                break
    return network


Work = Callable[[Network, Callable[[str], None]], Any]
Unfinished = tuple[str, str, str]
"""Outcome ("hang" or "loud"), the step it came to, and what happened."""


@dataclass
class _Running:
    process: Any
    network: Network
    ends: float
    step: str = "start"


def run_all(networks: Iterable[Network], work: Work, *, jobs: int, limit: float) -> Iterator[tuple[Network, Any]]:
    """Each network with what ``work`` returns in a process of its own, or with an :data:`Unfinished`."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    context = multiprocessing.get_context("fork")
    waiting = iter(networks)
    running: dict[Any, _Running] = {}
    try:
        while True:
            while len(running) < jobs and (network := next(waiting, None)) is not None:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(sender, network, work), daemon=True)
                process.start()
                sender.close()
                running[receiver] = _Running(process, network, time.monotonic() + limit)
            if not running:
                return
            patience = min(one.ends for one in running.values()) - time.monotonic()
            for connection in wait(list(running), timeout=max(0.0, patience)):
                one = running[connection]
                try:
                    kind, message = connection.recv()
                except EOFError:
                    one.process.join()
                    kind, message = "done", ("loud", one.step, f"Crash: exit code {one.process.exitcode}")
                if kind == "step":
                    one.step = message
                else:
                    del running[connection]
                    one.process.join()
                    yield one.network, message
            for connection, one in list(running.items()):
                if time.monotonic() > one.ends:
                    del running[connection]
                    one.process.kill()
                    one.process.join()
                    yield one.network, ("hang", one.step, f"not done after {limit:g} s")
    finally:
        for one in running.values():
            one.process.kill()


def _child(sender: Connection, network: Network, work: Work) -> None:
    result = work(network, lambda step: sender.send(("step", step)))
    sender.send(("done", result))
    sender.close()
