"""What a habit is: a few lines of source that some author of a network might have written, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.nasty.networks import Block

Place = Literal["convolution", "sum", "parent", "built", "later", "world"]
"""Where a habit lives.

convolution   the class of the large convolution, a subclass of nn.Conv2d
sum           the module whose forward adds up parallel convolutions
parent        the module that calls this one, or the convolution
built         statements that run once on the network, after it is built and before it is converted
later         statements that run on the original and on the converted network, between calls
world         nothing in the network: dtypes, sizes, batches, the circumstances of the conversion
"""


@dataclass(frozen=True)
class Habit:
    """Lines of source for the places of a class, or for one of its instances.

    In all of them ``$conv`` stands for the large convolution as it is reached from ``self``, ``$site`` for what the
    parent calls, ``$term`` for a summand. Statements of ``built`` and ``later`` see ``net``, ``block``, ``site``,
    ``conv``.

    Attributes:
        name: unique.
        places: where it may stand.
        header: lines at the top of the file.
        init, before, after, methods: lines in ``__init__``, in ``forward`` before and after what is called (input x,
            output y), and further methods.
        term: lines that compute ``t``, one of the summands.
        arguments: what the parent calls the site with.
        statements: of the places built and later.
        options: what a world is made of, by the names of :class:`networks.World`.
        needs: whether a block can have the habit.
        rough: where it jumps, rounding decides: not together with low precision.
        isolated: may never return, so that it needs a process of its own.
        told: where the report of the conversion says this, the difference has been announced.
        merges: not where the forward counts numbers of parameters, of which a merged model has others.
    """

    name: str
    places: tuple[Place, ...]
    header: str = ""
    init: str = ""
    before: str = ""
    after: str = ""
    methods: str = ""
    term: str = ""
    arguments: str = "x"
    statements: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: Callable[[Block], bool] = lambda block: True
    rough: bool = False
    isolated: bool = False
    told: str | None = None
    merges: bool = True


HABITS: dict[str, Habit] = {}


def habit(name: str, *places: Place, **lines: Any) -> None:
    """Enters a habit into the table.

    Raises:
        ValueError: there is one of this name.
    """
    if name in HABITS:
        raise ValueError(f"habit: there are two of the name {name!r}")
    given = {key: dedent(value).strip("\n") if isinstance(value, str) else value for key, value in lines.items()}
    HABITS[name] = Habit(name, places, **given)


def convolution(name: str, body: str, **lines: Any) -> None:
    """Enters a habit of a convolution class whose forward has this body; ``$plain`` is what nn.Conv2d does with x."""
    text = dedent(body).strip("\n").replace("$plain", _PLAIN)
    habit(name, "convolution", methods="def forward(self, x):\n" + indent(text, "    "), **lines)


_PLAIN = "F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)"

BOTH: tuple[Place, Place] = ("sum", "parent")
"""Where it makes no difference whether the site has the habit, or who calls it."""

SCALED_GRADIENT = """
class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * 3
"""
"""A function whose backward is not that of its forward."""


# ---- which blocks can have a habit


def reachable(block: Block) -> bool:
    """Its large convolution is a module, which can be reached from outside."""
    return block.kind != "functional"


def functional(block: Block) -> bool:
    """Its site calls F.conv2d with parameters of its own."""
    return block.kind == "functional"


def bare(block: Block) -> bool:
    """Its site is one convolution."""
    return block.kind == "conv"


def summed(block: Block) -> bool:
    """Its site is a module with summands that are modules."""
    return block.kind == "sum"


def several(block: Block) -> bool:
    """Its site has more than one summand."""
    return block.kind == "sum" and len(block.parts) > 0


def biased(block: Block) -> bool:
    """Its large convolution has a bias."""
    return block.convolution.bias


def resizable(block: Block) -> bool:
    """Its site may give a map of another size: a plain convolution, whose output is not added to the input."""
    return bare(block) and block.plain and "residual" not in block.tail
