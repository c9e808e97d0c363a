"""Notes on a model's own code: who asks for the class of a convolution, who reads a weight."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sw_transplant.find.match import Inspection
from sw_transplant.find.notes import notes_on

CONVOLUTIONS = (nn.Linear, nn.Conv2d)


def conv(kernel: int = 7) -> nn.Conv2d:
    return nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(), nn.Conv2d(4, 4, 1)
        self.convs = nn.ModuleList([conv(), nn.ReLU()])
        assert isinstance(self.conv, nn.Conv2d)  # before anything is converted

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


class Quiet(Block):
    """Says nothing: names without questions, questions about others, and what any kernel of its size answers."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.head, nn.Conv2d) and isinstance(x, Tensor) and type(x) is not nn.Parameter:
            x = x.to(self.conv.weight.dtype)
        return self.head(self.conv(x)) * self.head.weight.mean() / self.conv.weight.shape[-1] + self.conv.weight.numel()

    def _new(self) -> nn.Module:
        return nn.Conv2d(4, 4, 1)


class AsksOne(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (2 if isinstance(self.conv, nn.Conv2d) else 1)


class AsksEach(Block):
    def penalty(self) -> float:
        return sum(float(part.weight.abs().sum()) for part in self.modules() if isinstance(part, CONVOLUTIONS))


class AsksByType(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if type(self.conv) is nn.Conv2d else self.conv(x)


class AsksByClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.conv.__class__ in (nn.Conv2d, nn.Linear) else self.conv(x)


class AsksByBase(Block):
    def kind(self, part: nn.Module) -> bool:
        return isinstance(part, (_ConvNd, nn.Linear))


class AsksByMatch(Block):
    def kind(self, part: nn.Module) -> int:
        match part:
            case nn.Conv2d():
                return 1
        return 0


class AsksInside(Block):
    @functools.wraps(Block.forward)
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    @torch.no_grad()
    def initialise(self) -> None:
        def one(part: nn.Module) -> None:
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.zeros_(part.weight)

        self.apply(one)


class Inherits(AsksEach):
    def penalty(self) -> float:
        return 2 * super().penalty()


class Reads(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv.weight.mean()


class ReadsByAnotherName(Block):
    def clamp(self) -> None:
        layer = self.conv
        weight = layer.weight
        weight.data.clamp_(-1, 1)


class ReadsAnItem(Block):
    def clamp(self) -> None:
        self.convs[0].weight.data.clamp_(-1, 1)


ASKS = {
    AsksOne: "AsksOne.forward",
    AsksEach: "AsksEach.penalty",
    AsksByType: "AsksByType.forward",
    AsksByClass: "AsksByClass.forward",
    AsksByBase: "AsksByBase.kind",
    AsksByMatch: "AsksByMatch.kind",
    AsksInside: "AsksInside.initialise",
    Inherits: "AsksEach.penalty",
}
READS = {
    Reads: "Reads.forward reads 0.conv.weight",
    ReadsByAnotherName: "ReadsByAnotherName.clamp reads 0.conv.weight",
    ReadsAnItem: "ReadsAnItem.clamp reads 0.convs.0.weight",
}


@pytest.mark.parametrize("kind", ASKS)
def test_who_asks_for_the_class(kind: type[Block]) -> None:
    (note,) = notes_on(nn.Sequential(kind(), kind()))
    assert note.startswith(f"{ASKS[kind]} asks whether something is an instance of Conv2d: converted layers are none")


@pytest.mark.parametrize("kind", READS)
def test_who_reads_a_weight(kind: type[Block]) -> None:
    (note,) = notes_on(nn.Sequential(kind()))
    assert note.startswith(f"{READS[kind]}: ")
    assert note.endswith("layer.set_weight(tensor) writes")


def test_what_says_nothing() -> None:
    assert notes_on(nn.Sequential(Quiet(), Block(), conv())) == []
    assert notes_on(conv()) == []


def test_only_of_what_is_replaced() -> None:
    model = nn.Sequential(AsksOne(), Reads())
    assert len(notes_on(model)) == 2
    assert notes_on(model, sites=[]) == []
    assert [note.split()[0] for note in notes_on(model, sites=[model[1].conv])] == ["Reads.forward"]
    assert notes_on(model, sites=[model[0], model[1]]) == []  # code of a site goes with it


def test_nothing_is_run() -> None:
    class Loud(AsksOne):
        @property
        def surprise(self) -> nn.Module:
            raise AssertionError("run")

        def forward(self, x: Tensor) -> Tensor:
            return self.surprise.weight + super().forward(x)

    model = Loud()
    before = copy.deepcopy(model.state_dict())
    assert len(notes_on(model)) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_source_the_names_must_do() -> None:
    scope: dict[str, object] = {"nn": nn}
    source = "class Made(nn.Module):\n    def ask(self, part):\n        return isinstance(part, nn.Conv2d)\n"
    exec(source + "    def other(self, part):\n        return isinstance(part, nn.Linear)\n", scope)
    (note,) = notes_on(nn.Sequential(scope["Made"](), conv()))
    assert note.startswith("Made.ask asks")


def test_the_report_shows_them() -> None:
    text = str(Inspection((), (), (), ("something asks", "something reads")))
    assert text.endswith("Note: something asks.\nNote: something reads.")
    assert Inspection((), (), ()).notes == ()
    assert Inspection((), (), (), ("a",)).to_dict()["notes"] == ("a",)
