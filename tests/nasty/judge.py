"""The judgement: did the conversion keep the function of a network, refuse with a reason, raise, or lie?

Original and conversion are built from the same seed, run side by side from the same random states, and compared after
every step in all that a user can see. The first difference ends the judgement.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import rich.style  # noqa: F401  its import draws from Python's random, once: here, and not while a table is shown
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import sw_transplant
from sw_transplant import NoLargeKernelError, ShiftwiseConv2d, SWConfig
from tests.nasty.maps import draw_images, lay, scalar
from tests.nasty.networks import Network
from tests.nasty.pair import Pair, Side, shiftwise_layers
from tests.nasty.source import convolution_path
from tests.nasty.state import changed, numbers, random_states, seed_all, snapshot
from tests.nasty.verdict import Different, Verdict, is_ours, line

Convert = Callable[..., nn.Module]


def judge(
    network: Network,
    convert: Convert | None = None,
    *,
    note: Callable[[str], None] = lambda step: None,
    steps: int | None = None,
) -> Verdict:
    """Builds a network twice, converts one, and compares the two in everything.

    Args:
        network: from :func:`networks.draw`.
        convert: in the place of :func:`sw_transplant.convert`, to test the judgement itself; nothing else of the
            package is then called.
        note: is told every step before it runs, so that somebody knows where a judgement hangs or dies.
        steps: how many to take at most; None for all.
    """
    verdict = Verdict(network.seed, "same", habits=[one.name for one in network.all_habits])

    def counted(step: str) -> None:
        note(step)
        verdict.steps += 1
        if steps is not None and verdict.steps > steps:
            raise Different("same", step, "so many steps and no more")

    with warnings.catch_warnings(), _defaults():
        warnings.simplefilter("ignore")
        try:
            _Judgement(network, verdict, convert, counted).run()
        except Different as difference:
            verdict.outcome, verdict.where, verdict.what = difference.outcome, difference.where, difference.what
            if difference.outcome == "refused" and not verdict.reasons:
                verdict.reasons = [difference.what]
    return verdict


@contextmanager
def _defaults() -> Iterator[None]:
    """Puts global settings back, whatever happens."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


@contextmanager
def _half_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "device meta": lambda: torch.device("meta"),
    "default dtype float16": _half_by_default,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
"""What a conversion may be surrounded by."""


class _Judgement:
    def __init__(
        self, network: Network, verdict: Verdict, convert: Convert | None, note: Callable[[str], None]
    ) -> None:
        self.network, self.world, self.verdict, self.note = network, network.world, verdict, note
        self.ours, self.convert = convert is None, convert or sw_transplant.convert
        self.precise = self.world.dtype == "float64"
        self.config = SWConfig(
            min_kernel=self.world.min_kernel, form=self.world.form, tile=self.world.tile, edges=self.world.edges
        )
        self.report = ""
        self.calls = 0

    # ---- the course of it

    def run(self) -> None:
        self.note("build")
        try:
            old = Side(self.network)
        except Exception as error:
            raise Different("void", "build", line(error)) from error
        new = self._converted()
        self.verdict.layers = len(shiftwise_layers(new.net))
        if self.ours and not self.verdict.layers:
            raise Different("refused", "convert", "nothing was converted")
        pair = self._pair(old, new)
        self._course(pair)
        self._later(pair)
        self._transport(pair)
        if self.ours:
            self._merge(pair)
            self._save(pair)

    def _pair(self, old: Side, new: Side, **options: bool) -> Pair:
        told = any(one.told is not None and one.told in self.report for one in self.network.all_habits)
        return Pair(self.network, old, new, self.verdict, self.note, told=told, **options)

    def _course(self, pair: Pair) -> None:
        first, second = self.world.sizes
        for _ in range(3):
            self._forward(pair, "as it is", first)
        self._modes(pair, False)
        for size in (first, second, first):
            self._forward(pair, "eval", size)
        self._forward(pair, "eval with gradients", first, grad=True, backward=True)
        self._forward(pair, "eval with gradients, input without", second, grad=True)
        self._modes(pair, True)
        for size in (first, first, second):
            self._forward(pair, "train", size, grad=True, backward=True)
        self._forward(pair, "train, input without gradients", first, grad=True)
        self._step(pair)
        self._forward(pair, "train after a step", first, grad=True, backward=True)
        self._modes(pair, False)
        self._forward(pair, "eval after a step", second)
        for kind in self._kinds():
            self._forward(pair, f"eval on {kind}", first, kind=kind)

    def _kinds(self) -> Iterator[str]:
        yield from ("zeros", "one image")
        if self.precise:
            yield "large"
            if self.world.form == "assembled":  # the other forms spread what is not finite over a channel
                yield "not finite"

    # ---- the conversion

    def _around(self) -> AbstractContextManager[Any]:
        return _AROUND[self.world.around]()

    def _converted(self) -> Side:
        """A network and its conversion; whoever reads the one has not changed it."""
        side = Side(self.network)
        given, before = side.net, snapshot(side.net)
        seed_all(7)
        states = random_states()
        if self.ours:
            self.note("inspect_model")
            try:
                with self._around():
                    inspection = sw_transplant.inspect_model(given, self.config)
            except Exception as error:
                raise self._refusal("inspect_model", error) from error
            self.report = str(inspection)
            self.verdict.reasons = [skipped.reason for skipped in inspection.skipped]
            self._untouched("inspect_model", states, before, given)
        self.note("convert")
        try:
            with self._around():
                side.net = self.convert(given, self.config, inplace=self.world.inplace)
        except Exception as error:
            self._untouched("convert that raises", states, before, given)
            raise self._refusal("convert", error) from error
        self._undrawn("convert", states)
        if not self.world.inplace:
            self._untouched("convert", states, before, given)
        elif self.ours and side.net is not given and not isinstance(side.net, ShiftwiseConv2d):
            raise Different("wrong", "convert in place", "returns another object")
        return side

    def _refusal(self, where: str, error: Exception) -> Different:
        if isinstance(error, NoLargeKernelError):
            self.verdict.reasons = self.verdict.reasons or [str(error).split("\n")[0]]
            return Different("refused", where, str(error))
        refused = type(error) in (ValueError, NotImplementedError) and is_ours(error)
        return Different("refused" if refused else "loud", where, line(error))

    def _undrawn(self, where: str, states: dict[str, Any]) -> None:
        for name, state in random_states().items():
            if state != states[name]:
                raise Different("wrong", f"{where}: random state", name)

    def _untouched(self, where: str, states: dict[str, Any], before: dict[str, Any], net: nn.Module) -> None:
        self._undrawn(where, states)
        if (what := changed(before, snapshot(net))) is not None:
            raise Different("wrong", f"{where}: the network that was given changes", what)

    # ---- steps

    def _modes(self, pair: Pair, training: bool) -> None:
        pair.both("modes", lambda side: side.net.train() if training else side.net.eval())
        pair.state("modes")

    def _forward(
        self,
        pair: Pair,
        where: str,
        size: tuple[int, int],
        *,
        grad: bool = False,
        backward: bool = False,
        kind: str = "noise",
    ) -> bool:
        """One call of both sides, and where it is asked for its backward pass; and everything compared.

        Returns:
            Whether it ran, or raised in both.
        """
        self.calls += 1
        images = draw_images(self.network, size, kind, self.calls)

        def run(side: Side) -> dict[str, Any]:
            side.net.zero_grad(set_to_none=True)
            seed_all(self.calls)
            leaf = lay(images, self.world.layout)
            given = leaf.requires_grad_() * 1 if backward else leaf  # a leaf cannot be written to in place
            autocast = torch.autocast("cpu", torch.bfloat16) if self.world.autocast else nullcontext()
            with torch.set_grad_enabled(grad), autocast:
                output = side.net(given)
            leaves, structure = tree_flatten(output)
            drawn = random_states()
            if backward and (loss := scalar(leaves)).requires_grad:
                loss.backward()
            return {
                "structure": str(structure),
                "output": [one.detach() if isinstance(one, Tensor) else one for one in leaves],
                "who wants gradients": [one.requires_grad for one in leaves if isinstance(one, Tensor)],
                "input afterwards": given.detach(),
                "gradient of the input": leaf.grad,
                "random state": drawn,
                "random state after backward": random_states(),
            }

        results = pair.both(where, run)
        if results is None:
            return False
        for what, old in results[0].items():
            if what.startswith("random state"):
                pair.random_states(where, old, results[1][what])
            else:
                pair.compare(f"{where}: {what}", old, results[1][what])
        if backward:
            pair.gradients(where)
        pair.state(where)
        return True

    def _step(self, pair: Pair) -> None:
        """One step of SGD; who asks for no weight decay, or for a rate of its own, by an attribute, gets it."""
        if not self.precise or self.world.edges:  # training amplifies rounding, and new edges grow
            return

        def run(side: Side) -> None:
            with torch.no_grad():
                for parameter in side.net.parameters():
                    if parameter.grad is not None:
                        decay = 0.0 if getattr(parameter, "_no_weight_decay", False) else 0.1
                        rate = 0.05 * getattr(parameter, "rate", 1.0)
                        parameter.sub_(rate * (parameter.grad + decay * parameter))

        # A backward pass that raises leaves some gradients behind: which, depends on the order of the parts.
        if self._forward(pair, "train before a step", self.world.sizes[1], grad=True, backward=True):
            pair.both("step", run)
            pair.state("after a step")

    def _later(self, pair: Pair) -> None:
        """The statements that users run afterwards, where what they speak of has not gone into a sum."""
        if not any("later" in one.places for one in self.network.all_habits):
            return
        paths = {path for path, _ in pair.new.net.named_modules(remove_duplicate=False)}
        if not all(convolution_path(i, block) in paths for i, block in enumerate(self.network.blocks)):
            return
        first, _ = self.world.sizes
        pair.both("statements afterwards", lambda side: side.file.later(side.net))
        pair.state("after statements")
        self._forward(pair, "eval after statements", first)
        self._modes(pair, True)
        self._forward(pair, "train after statements", first, grad=True, backward=True)
        self._step(pair)
        self._modes(pair, False)
        self._forward(pair, "eval after statements and a step", first)

    def _transport(self, pair: Pair) -> None:
        if not self.world.transport:
            return
        moved = copy.deepcopy if self.world.transport == "deepcopy" else lambda net: pickle.loads(pickle.dumps(net))

        def run(side: Side) -> bool:
            side.net = moved(side.net)
            return True

        if pair.both(self.world.transport, run) is None:
            return
        first, _ = self.world.sizes
        self._forward(pair, f"eval after {self.world.transport}", first)
        self._modes(pair, True)
        self._forward(pair, f"train after {self.world.transport}", first, grad=True, backward=True)
        self._modes(pair, False)

    def _merge(self, pair: Pair) -> None:
        """The plain network is the original in eval, and wants gradients where the original does."""
        if self.world.autocast:
            return  # what is merged into one kernel is rounded as one, a map that is added to it as well
        if any(not one.merges for one in self.network.all_habits):
            return
        wanted = {number.name: number.old.requires_grad for number in numbers(pair.old.net, pair.new.net)}
        alone = [path for path, one in shiftwise_layers(pair.new.net).items() if _is_one_convolution(one)]
        self.note("merge")
        try:
            pair.new.net = sw_transplant.merge(pair.new.net)
        except Exception as error:
            self._accept("merge", error)
            return
        merged = self._pair(pair.old, pair.new, exact=False)
        for size in self.world.sizes:
            if self.world.batch is None and not self._runs(pair.old, size):
                continue  # a BatchNorm refuses single maps; once it is folded, nobody does
            self._forward(merged, "eval after merge", size)
        parameters = dict(pair.new.net.named_parameters())
        for name in (".".join(part for part in (path, own) if part) for path in alone for own in ("weight", "bias")):
            if name in wanted and name in parameters and parameters[name].requires_grad != wanted[name]:
                pair.differs("merge: requires_grad", name)

    def _runs(self, side: Side, size: tuple[int, int]) -> bool:
        try:
            copy.deepcopy(side.net)(draw_images(self.network, size, "noise", 0))  # which may change itself
        except Exception:
            return False
        return True

    def _save(self, pair: Pair) -> None:
        """What is saved and loaded on another network of the architecture is the original."""
        try:
            state, again = pair.old.net.state_dict(), Side(self.network).net
            again.load_state_dict(state)
            faithful = all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
        except Exception:
            return  # then there is nothing to save
        if not faithful:
            return  # its own hooks change what is saved
        self.note("save and load")
        old, new, base = Side(self.network), Side(self.network), Side(self.network)
        try:
            with tempfile.TemporaryDirectory() as folder:
                sw_transplant.save(sw_transplant.convert(new.net, self.config), folder)
                with torch.no_grad():
                    for tensor in base.net.parameters():
                        tensor.mul_(0.7)
                base.net = sw_transplant.load(base.net, folder)
        except Exception as error:
            self._accept("save and load", error)
            return
        loaded = self._pair(old, base, remembers=False)
        self._modes(loaded, False)
        self._forward(loaded, "eval after save and load", self.world.sizes[0])

    def _accept(self, where: str, error: Exception) -> None:
        """Refusals are fine, everything else is not."""
        if self._refusal(where, error).outcome != "refused":
            raise Different("loud", where, line(error)) from error


def _is_one_convolution(layer: ShiftwiseConv2d) -> bool:
    return len(layer.branches) == 1 and layer.branches[0].bn is None
