"""The public names and their signatures are those of api.json; what is no accident is written there."""

import importlib
import sys
from pathlib import Path

import pytest

from tests import api


def test_the_public_names_are_as_written_down() -> None:
    pytest.importorskip("timm", reason="sw_transplant.models needs timm")
    found = api.problem()
    assert not found, found


MODULE = '''
import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

LIMIT = 7
TABLE = {"a": object(), "b": object()}


def paint(area: float, /, colour: str = "red", *rest: int, layers=LIMIT, activation=torch.relu, **more) -> "list[str]":
    """A function."""


@torch.no_grad()
def wrapped(x: int = 3):
    """A function behind a decorator."""


class Base:
    def inherited(self, x=(1, 2)) -> int:
        return 1


class Module(torch.nn.Module, Base):
    size: int
    kind = "wide"

    def __init__(self, channels: int, tile: int = 3) -> None:
        self.channels: int = channels
        self.tile, self._cache = tile, None

    @property
    def area(self) -> float:
        return 1.0

    @property
    def form(self) -> str:
        return ""

    @form.setter
    def form(self, value: str) -> None: ...

    @functools.cached_property
    def slow(self) -> int:
        return 1

    @classmethod
    def build(cls, name: str = "x"): ...

    @staticmethod
    def check(x): ...

    def _private(self, x): ...


@dataclass(frozen=True)
class Settings:
    rate: float
    steps: int | None = None
    names: list = field(default_factory=list)


class Pair(NamedTuple):
    left: int
    right: tuple[int, ...] = ()
'''
DESCRIBED = {
    "LIMIT": "int = 7",
    "Module": "class(Module)",
    "Module.__init__": "(self, channels: int, tile: int=3) -> None",
    "Module.area": "property -> float",
    "Module.build": "classmethod (cls, name: str='x')",
    "Module.channels": "attribute: int",
    "Module.check": "staticmethod (x)",
    "Module.form": "property -> str, can be set",
    "Module.inherited": "(self, x=(1, 2)) -> int",
    "Module.kind": "attribute = 'wide'",
    "Module.size": "attribute: int",
    "Module.slow": "property -> int",
    "Module.tile": "attribute",
    "Pair": "class(tuple): left, right",
    "Pair.left": "attribute: int",
    "Pair.right": "attribute: tuple[int, ...] = ()",
    "Settings": "@dataclass(frozen=True) class(): rate, steps, names",
    "Settings.names": "attribute: list = list()",
    "Settings.rate": "attribute: float",
    "Settings.steps": "attribute: int | None = None",
    "TABLE": "dict of 'a', 'b'",
    "paint": "(area: float, /, colour: str='red', *rest: int, layers=7, activation=relu, **more) -> 'list[str]'",
    "wrapped": "(x: int=3)",
}


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the text of a module to the description of what is in it."""
    monkeypatch.syspath_prepend(tmp_path)
    loaded = []

    def load(text: str) -> dict[str, str]:
        name = f"painted_{len(loaded)}"
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        loaded.append(name)
        public = ("LIMIT", "Module", "Pair", "Settings", "TABLE", "paint", "wrapped")
        return {key: text for each in public for key, text in api.describe(each, getattr(module, each)).items()}

    yield load
    for name in loaded:
        del sys.modules[name]


def test_descriptions(described) -> None:
    assert described(MODULE) == DESCRIBED


def test_what_a_public_class_hands_down_is_told_once() -> None:
    described = api.describe("B", Inheriting, [Told])
    assert described == {"B": "class(Told)", "B.own": "(self)", "B.shared": "(self, x)"}
    assert api.describe("B", Inheriting).keys() == {"B", "B.own", "B.shared", "B.more", "B.hidden"}


class Hidden:
    def hidden(self): ...


class Told(Hidden):
    def shared(self): ...

    def more(self): ...


class Inheriting(Told):
    def shared(self, x): ...

    def own(self): ...


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("# no change", "# none", ""),
        ("tile: int = 3)", "tile: int = 3, edges: int = 4)", "changed  Module.__init__ | tile: int=3) | edges: int=4)"),
        ("tile: int = 3)", "tile: int = 5)", "changed  Module.__init__ | tile: int=3) | tile: int=5)"),
        ("LIMIT = 7", "LIMIT = 8", "changed  LIMIT | changed  paint | layers=7, | layers=8,"),
        ("area: float, /,", "area: float,", "changed  paint | (area: float, /, | (area: float, colour"),
        ("*rest: int, layers", "*, layers", "changed  paint | *rest: int | *, layers"),
        ("activation=torch.relu", "activation=torch.tanh", "changed  paint | activation=relu | activation=tanh"),
        ('-> "list[str]"', "-> int", "changed  paint | -> 'list[str]' | -> int"),
        ("def wrapped(x: int = 3)", "def wrapped(x: int = 4)", "changed  wrapped | (x: int=3) | (x: int=4)"),
        ("def inherited(self, x", "def inherited(self, y", "changed  Module.inherited | (self, y=(1, 2))"),
        ("    @form.setter\n    def form(self, value: str) -> None: ...\n", "", "changed  Module.form | , can be set"),
        ("def check(x): ...", "def probe(x): ...", "removed  Module.check | added    Module.probe  staticmethod (x)"),
        ("    @property\n    def area", "    def area", "changed  Module.area | property -> float | (self) -> float"),
        ("self.channels: int = channels", "self._channels = channels", "removed  Module.channels  attribute: int"),
        ("kind = \"wide\"", "kind = \"tall\"", "changed  Module.kind | 'wide' | 'tall'"),
        ("def _private(self, x)", "def _private(self, y)", ""),
        ("torch.nn.Module, Base)", "torch.nn.Module)", "removed  Module.inherited"),
        ("class Module(torch.nn.Module, Base)", "class Module(Base)", "changed  Module | class(Module) | class()"),
        ("@dataclass(frozen=True)", "@dataclass", "changed  Settings | @dataclass class()"),
        ("    left: int\n", "    left: int\n    middle: int\n", "added    Pair.middle  attribute: int | changed  Pair"),
        ("right: tuple[int, ...] = ()", "right: tuple[int, ...] = (1,)", "changed  Pair.right | = () | = (1,)"),
        ("default_factory=list", "default_factory=tuple", "changed  Settings.names | list() | tuple()"),
        ('"b": object()', '"c": object()', "changed  TABLE | 'a', 'b' | 'a', 'c'"),
    ],
)  # fmt: skip
def test_what_changes_is_told(described, before: str, after: str, told: str) -> None:
    text = MODULE + "# no change\n"
    assert before in text
    lines = api.differences(described(text), described(text.replace(before, after)))
    assert bool(lines) == bool(told)
    for part in told.split(" | "):
        assert part in "\n".join(lines)


def test_a_default_without_a_text_of_its_own_is_refused(described) -> None:
    with pytest.raises(ValueError, match="has another text in every run"):
        described(MODULE.replace("tile: int = 3", "tile: int = object()"))


def test_what_cannot_be_found_in_the_source_is_refused(described) -> None:
    hidden = "if LIMIT:\n\n    def paint():\n        return 1\n"
    with pytest.raises(ValueError, match=r"painted_0: paint is defined in a branch"):
        described(MODULE.replace("def paint(", "def _paint(") + hidden)


def test_the_command_tells_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    pytest.importorskip("timm", reason="sw_transplant.models needs timm")
    locked = tmp_path / "api.json"
    locked.write_text(api.LOCK.read_text().replace("inplace: bool=False", "inplace: bool=True"))
    monkeypatch.setattr(api, "LOCK", locked)
    assert api.main([]) == 1
    told = capsys.readouterr().out
    assert "changed  sw_transplant.convert\n" in told
    assert told.endswith("If that is meant, write them down: python -m tests.api --write\n")
    assert api.main(["--write"]) == 0
    assert api.main([]) == 0
    assert api.main(["--help"]) == 2
