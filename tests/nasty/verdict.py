"""What a judgement says of a network."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Verdict:
    """What became of one network.

    Attributes:
        seed: of the network.
        outcome: "same", "refused", "told" (another function, and the report says so), "loud" (raises where the
            original does not), "wrong" (another function in silence), "void" (the original cannot be built), "hang".
        where: which comparison differs, or where it raises.
        what: the first difference, or what was raised.
        reasons: of layers that were left as they are.
        layers: how many were converted.
        habits: names.
        steps: how many were taken until then.
        raised: in how many of them both sides raised.
    """

    seed: int
    outcome: str
    where: str = ""
    what: str = ""
    reasons: list[str] = field(default_factory=list)
    layers: int = 0
    habits: list[str] = field(default_factory=list)
    steps: int = 0
    raised: int = 0

    @property
    def failed(self) -> bool:
        """Whether the conversion did what it must never do."""
        return self.outcome in ("wrong", "loud", "hang")

    @property
    def kind(self) -> str:
        """What was compared, without when ("output", "gradients", ...); or which step raises what."""
        if self.outcome == "wrong":
            return self.where if self.where.startswith(READING) else self.where.split(": ")[-1]
        return f"{self.where} raises {self.what.split(':')[0]}" if self.outcome == "loud" else self.outcome

    def to_dict(self) -> dict[str, Any]:
        """The verdict, ready for JSON."""
        return asdict(self)


READING = ("convert", "inspect_model", "merge")
"""Steps that read a network, or change it, and run nothing."""


class Different(Exception):
    """Original and conversion are not the same; ``outcome``, ``where`` and ``what`` as in :class:`Verdict`."""

    def __init__(self, outcome: str, where: str, what: str) -> None:
        super().__init__(f"{outcome}: {where}: {what}")
        self.outcome, self.where, self.what = outcome, where, what


def line(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by the package itself, and not by what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("sw_transplant")


def names_a_way(error: BaseException) -> bool:
    """Whether what a converted layer cannot do is refused, in words that say what can be done or what is missing."""
    if is_ours(error):
        return any(way in str(error) for way in ("set_weight", "merge", "inplace=True"))
    return "ShiftwiseConv2d" in str(error) and "does not have a parameter" in str(error)  # as parametrize says
