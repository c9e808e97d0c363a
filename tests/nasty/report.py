"""What many judgements say together, as tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from sw_transplant.tables import render_table
from tests.nasty.networks import Network, draw
from tests.nasty.verdict import Verdict

_OUTCOMES = {
    "same": "converted, the same",
    "told": "converted, another function, and the report says so",
    "refused": "refused with a reason",
    "void": "void: the original cannot be built",
    "loud": "loud: raises where the original does not",
    "wrong": "wrong in silence",
    "hang": "hanging",
}


def report(verdicts: Sequence[Verdict], small: Mapping[int, Network]) -> str:
    """Three tables: how many of each outcome, refusals by reason, failures by comparison and habits.

    Args:
        verdicts: at least one.
        small: for some failing seeds, smaller networks that fail alike; their habits are listed.
    """
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    rows = [["drawn", str(len(verdicts))], *([text, str(outcomes[name])] for name, text in _OUTCOMES.items())]
    rows.append(["of all: both raise at most steps", str(sum(2 * one.raised > one.steps for one in verdicts))])
    rows.append(["layers converted", str(sum(verdict.layers for verdict in verdicts))])
    parts = [render_table("Networks", ["", "count"], rows)]
    reasons = Counter(shape_of(reason) for verdict in verdicts for reason in verdict.reasons)
    if reasons:
        listed = [[str(count), reason[:130]] for reason, count in reasons.most_common()]
        parts.append(render_table("Layers left as they are", ["count", "reason"], listed))
    failing = sorted((verdict for verdict in verdicts if verdict.failed), key=lambda verdict: verdict.seed)
    if failing:
        groups: dict[tuple[str, str, str], list[int]] = {}
        for verdict in failing:
            network = small.get(verdict.seed) or draw(verdict.seed)
            habits = ", ".join(one.name for one in network.all_habits) or "(none)"
            groups.setdefault((verdict.outcome, verdict.kind, habits), []).append(verdict.seed)
        listed = [
            [str(len(seeds)), *group, " ".join(map(str, seeds[:6])) + (" ..." if len(seeds) > 6 else "")]
            for group, seeds in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
        ]
        parts.append(render_table("Failures", ["count", "outcome", "comparison", "habits", "seeds"], listed))
        parts.append("Failing seeds: " + " ".join(str(verdict.seed) for verdict in failing))
        parts.append("See one with: python -m tests.nasty --only SEED -v")
    return "\n".join(parts)


def shape_of(reason: str) -> str:
    """A reason without the names and numbers of one network."""
    names = r"\b(blocks|parts|site|net|twin|again|part\d|conv\d|bn\d)(\.\w+)+|\b(Site|Block|Conv)\d"
    return re.sub(r"\d+", "N", re.sub(names, "...", reason))
