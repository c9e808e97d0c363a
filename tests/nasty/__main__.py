"""Judges many drawn networks, each in a process of its own, or shows one: python -m tests.nasty --help."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sw_transplant.tables import render_table
from tests.nasty.habit import HABITS
from tests.nasty.networks import Network, draw
from tests.nasty.processes import judge_all, shrink_all
from tests.nasty.report import report
from tests.nasty.smaller import alone
from tests.nasty.source import source
from tests.nasty.threads import hammer
from tests.nasty.verdict import Verdict


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 where nothing failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.nasty", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="networks to draw (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for each network (default 30)")
    parser.add_argument("--only", type=int, metavar="SEED", help="judge one network")
    parser.add_argument("--habit", metavar="NAME", help="networks of this habit and no other; 'all' for each in turn")
    parser.add_argument("--whole", action="store_true", help="do not look for the smallest networks that fail alike")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every verdict there")
    parser.add_argument("--threads", action="store_true", help="convert in many threads at a time instead")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the source of what fails")
    options = parser.parse_args(arguments)
    if options.threads:
        errors = hammer()
        print("\n".join(errors) or "no errors")
        return 1 if errors else 0
    if options.habit is not None:
        return _habits(options)
    if options.only is not None:
        return _only(draw(options.only), verbose=options.verbose, limit=options.limit, whole=options.whole)
    return _many(options)


def _many(options: argparse.Namespace) -> int:
    started = time.monotonic()
    networks = (draw(seed) for seed in range(options.seed, options.seed + options.count))
    verdicts = _judged(networks, options)
    small: dict[int, Network] = {}
    if not options.whole:
        pairs = [(draw(one.seed), one) for one in verdicts if one.failed and one.outcome != "hang"]
        small = dict(shrink_all(pairs, jobs=options.jobs))
    print(report(verdicts, small))
    print(f"{time.monotonic() - started:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps([one.to_dict() for one in verdicts], indent=1) + "\n")
    if options.verbose:
        for seed, least in sorted(small.items()):
            print(f"\n# ---- seed {seed}\n{source(least)}")
    return 1 if any(one.failed for one in verdicts) else 0


def _judged(networks: Iterable[Network], options: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    for verdict in judge_all(networks, jobs=options.jobs, limit=options.limit):
        verdicts.append(verdict)
        if len(verdicts) % 50 == 0:
            print(f"{len(verdicts)} judged, {sum(one.failed for one in verdicts)} failed", file=sys.stderr, flush=True)
    return verdicts


def _habits(options: argparse.Namespace) -> int:
    names = list(HABITS) if options.habit == "all" else [options.habit]
    networks = [network for name in names for network in alone(name)]
    networks = [replace(network, seed=seed) for seed, network in enumerate(networks)]
    verdicts = _judged(networks, options)
    rows = [
        [one.outcome, networks[one.seed].blocks[0].kind, one.habits[0], f"{one.where}: {one.what}"[:100]]
        for one in sorted(verdicts, key=lambda one: one.seed)
        if one.failed or len(names) == 1
    ]
    print(render_table("Habits alone", ["outcome", "site", "habit", "difference"], rows))
    print(f"{sum(one.failed for one in verdicts)} of {len(verdicts)} networks failed")
    if options.verbose:
        print("\n".join(source(networks[one.seed]) for one in verdicts if one.failed))
    return 1 if any(one.failed for one in verdicts) else 0


def _only(network: Network, *, verbose: bool, limit: float, whole: bool) -> int:
    verdict = next(judge_all([network], limit=limit))
    if verdict.outcome in ("wrong", "loud") and not whole:
        network = dict(shrink_all([(network, verdict)]))[network.seed]
        verdict = next(judge_all([network], limit=limit))
    if verbose:
        print(f"{source(network)}\n# {network.world}")
    print(f"{network.seed}: {verdict.outcome}; {verdict.layers} layers converted")
    print(f"  where: {verdict.where}\n  what: {verdict.what}\n  habits: {', '.join(verdict.habits)}")
    for reason in verdict.reasons:
        print(f"  left: {reason}")
    return 1 if verdict.failed else 0


if __name__ == "__main__":
    sys.exit(main())
