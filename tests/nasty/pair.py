"""An original and its conversion, run side by side, and all that is compared between them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant import ShiftwiseConv2d
from tests.nasty.building import build, load
from tests.nasty.networks import Network
from tests.nasty.state import Number, attributes, buffers_lost, numbers
from tests.nasty.verdict import Different, Verdict, line, names_a_way

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest error of outputs relative to their largest number. The truth is told in float64; with less only gross errors
count, for networks amplify rounding."""

GRADIENTS = 10
"""Gradients hold to so many times the bound."""

NOISE = 1e-3
"""Errors of gradients are measured by this at least: each element of an output has one of about 1."""

NOTHING = 1e-12
"""Errors of state are measured by this at least: a variance of equal numbers is rounding."""

STATE = 100
"""Parameters and buffers, which steps and averages add up in, hold to so many times the bound."""


class Side:
    """One of the two networks, with the file that it was made from."""

    def __init__(self, network: Network) -> None:
        self.file: ModuleType = load(network)
        self.net: Any = build(self.file, network)


class Pair:
    """Original and conversion.

    Args:
        network: what both are.
        old: the original.
        new: the conversion.
        verdict: where is noted how often both raise.
        note: is told every step before it runs.
        told: whether the report of the conversion has announced the difference that a network is known for.
        exact: whether states are compared, too; not for a merged network, whose parameters are others.
        remembers: whether plain attributes are compared; not after loading, for they are in no state_dict.
    """

    def __init__(
        self,
        network: Network,
        old: Side,
        new: Side,
        verdict: Verdict,
        note: Callable[[str], None],
        *,
        told: bool = False,
        exact: bool = True,
        remembers: bool = True,
    ) -> None:
        self.old, self.new, self.verdict, self.note, self.told = old, new, verdict, note, told
        self.exact, self.remembers, self.edges = exact, remembers, network.world.edges is not None
        world = network.world
        self.bound = BOUNDS[torch.bfloat16 if world.autocast else getattr(torch, world.dtype)]
        lost = buffers_lost(old.net, new.net) if exact else {}
        self.lost = {name: value.clone() for name, value in lost.items()}
        self.first = attributes(old.net)

    # ---- running

    def both(self, where: str, run: Callable[[Side], Any]) -> tuple[Any, Any] | None:
        """Runs both sides and returns what they return; None where both raise.

        Raises:
            Different: only one of them raises.
        """
        self.note(where)
        results: list[Any] = []
        errors: list[Exception | None] = []
        for side in (self.old, self.new):
            try:
                results.append(run(side))
                errors.append(None)
            except Exception as error:  # networks may raise anything
                errors.append(error)
        old, new = errors
        if old is None and new is None:
            return results[0], results[1]
        if old is None and new is not None:
            raise Different("refused" if names_a_way(new) else "loud", where, line(new)) from new
        if old is not None and new is None:
            raise Different("wrong", f"{where}: only the original raises", line(old))
        if new is not None and names_a_way(new):  # and then what the original had done by then may differ
            raise Different("refused", where, line(new)) from new
        self.verdict.raised += 1
        return None

    # ---- comparing

    def differs(self, where: str, what: str) -> None:
        """
        Raises:
            Different: always; "told" where the report has announced it.
        """
        raise Different("told" if self.told else "wrong", where, what)

    def compare(self, where: str, old: Any, new: Any) -> None:
        """Compares lists of tensors and other values, or two values."""
        bound = self.bound * (GRADIENTS if "gradient of" in where else 1)
        olds, news = (one if isinstance(one, list) else [one] for one in (old, new))
        if len(olds) != len(news):
            self.differs(where, f"{len(olds)} tensors against {len(news)}")
        for one, other in zip(olds, news, strict=True):
            if (what := difference(one, other, bound)) is not None:
                self.differs(where, what)

    def random_states(self, where: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Compares what :func:`state.random_states` gave."""
        for name, state in old.items():
            if state != new[name]:
                self.differs(f"{where}: random state", name)

    def gradients(self, where: str) -> None:
        """Compares the gradients of all parameters; those of kernels laid out, as the banks have theirs."""
        if self.edges or not self.exact:
            return
        both = [(number, number.old.grad, number.new_gradient()) for number in numbers(self.old.net, self.new.net)]
        finite = [old for _, old, _ in both if old is not None and old.isfinite().all()]
        count = sum(old.numel() for old in finite)
        # A bias before a BatchNorm has nothing but rounding: errors are measured by the average gradient at least.
        average = (sum(float(old.double().square().sum()) for old in finite) / count) ** 0.5 if count else 0.0
        least = max(average, NOISE)
        for number, old, new in both:
            if old is None or new is None:
                present = new if old is None else old
                if present is not None and bool(present.any()):
                    self.differs(f"{where}: gradients", f"{number.name}: {_shown(old)} against {_shown(new)}")
                continue
            what = difference(number.lay(old), new, GRADIENTS * self.bound, least=least)
            if what is not None:
                self.differs(f"{where}: gradients", f"{number.name}: {what}")

    def state(self, where: str) -> None:
        """Compares parameters, buffers, who wants gradients, and attributes."""
        if not self.exact:
            return
        if not self.edges:
            for number in numbers(self.old.net, self.new.net):
                self._number(where, number)
        for name, value in buffers_lost(self.old.net, self.new.net).items():
            if name in self.lost and not torch.equal(value, self.lost[name]):
                self.differs(f"{where}: parameters and buffers", f"{name} changes, and the conversion has none")
        if self.remembers:
            self._attributes(where)

    def _number(self, where: str, number: Number) -> None:
        new = number.new()
        if new is None:
            self.differs(f"{where}: parameters and buffers", f"{number.name} is gone")
            return
        what = difference(number.lay(number.old.detach()), new.detach(), STATE * self.bound, least=NOTHING)
        if what is not None:
            self.differs(f"{where}: parameters and buffers", f"{number.name}: {what}")
        if number.old.requires_grad != new.requires_grad:
            self.differs(f"{where}: requires_grad", number.name)

    def _attributes(self, where: str) -> None:
        old, new = attributes(self.old.net), attributes(self.new.net)
        for name, value in old.items():
            if name in new:
                if self._unlike(value, new[name]):
                    self.differs(f"{where}: attributes", f"{name}: {value!s:.40} against {new[name]!s:.40}")
            elif name in self.first and not name.endswith(".training") and self._unlike(value, self.first[name]):
                self.differs(f"{where}: attributes", f"{name} changes, and the conversion has none")

    def _unlike(self, one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return difference(one, other, STATE * self.bound) is not None
        return type(one) is not type(other) or one != other


def difference(old: Any, new: Any, bound: float, *, least: float = 0.0) -> str | None:
    """What distinguishes two tensors or two other values, in words; None where nothing does.

    Args:
        old, new: the values.
        bound: largest error relative to the largest number of ``old``.
        least: the smallest number that errors are measured by.
    """
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        same = not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new
        return None if same else f"{_shown(old)} against {_shown(new)}"
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{old.dtype} {tuple(old.shape)} against {new.dtype} {tuple(new.shape)}"
    if not old.is_floating_point():
        return None if torch.equal(old, new) else "other numbers"
    finite = old.isfinite()
    if not torch.equal(finite, new.isfinite()):
        return f"{int((~finite).sum())} numbers are not finite, against {int((~new.isfinite()).sum())}"
    if not finite.any():
        return None
    one, other = old[finite].double(), new[finite].double()
    scale, error = max(float(one.abs().max()), least), float((one - other).abs().max())
    return None if error <= bound * scale else f"off by {error:.2g} where the largest number is {scale:.2g}"


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def shiftwise_layers(net: nn.Module) -> dict[str, ShiftwiseConv2d]:
    """The converted layers by their paths."""
    return {path: module for path, module in net.named_modules() if isinstance(module, ShiftwiseConv2d)}
