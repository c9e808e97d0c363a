"""Imports inside the package go down from room to room and never in a circle, and every room says what is in it."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sw_transplant"

# From the ground up; a room need not exist. The public names stand above the rooms that they come from, and below the
# command line, which uses them.
FLOORS = [
    "interrupts",
    "tables",
    "batches",
    "geometry",
    "equivalence",
    "config",
    "cuda",
    "ops",
    "forms",
    "layers",
    "find",
    "models",
    "surgery",
]
FLOORS += ["sparsity", "science", "hf", "check", "__init__", "report", "cli", "__main__"]


def modules_of(package: Path) -> dict[str, Path]:
    """Every module by its dotted name."""
    paths = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in sorted(paths.items())}


def imports_of(package: Path) -> dict[tuple[str, str], str]:
    """Which module imports which, be it inside a function or for types only: ``(importer, imported)`` and the place."""
    modules, found = modules_of(package), {}
    for importer, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(package.parent)}:{getattr(node, 'lineno', 0)}"
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{where}: a relative import; name the module in full, from {package.name} on"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            for name in names:
                while name and name not in modules:  # the last part may be something that the module defines
                    name = name.rpartition(".")[0]
                if name:
                    found.setdefault((importer, name), where)
    return found


def floor(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    assert room in FLOORS, f"{module} is on no floor: enter '{room}' in FLOORS of tests/test_floors.py, in its place"
    return FLOORS.index(room)


def upward_imports(package: Path) -> list[str]:
    return [
        f"{where}: {importer} imports {imported}, which is above it; from the ground up: {' < '.join(FLOORS)}"
        for (importer, imported), where in imports_of(package).items()
        if floor(imported) > floor(importer)
    ]


def circles(package: Path) -> list[str]:
    """The steps of a circle, if there is one. That an import runs the `__init__` of the rooms around it is no step."""
    imports = imports_of(package)
    graph: dict[str, set[str]] = {}
    for importer, imported in imports:
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]  # it comes as imported, importer, ...
        return [f"{imports[step]}: {step[0]} imports {step[1]}, a step of a circle" for step in pairwise(circle)]
    return []


def incomplete_pages(package: Path) -> list[str]:
    """Rooms whose docstring does not list their modules: a line ``name[, name]   what`` each, in the order to read."""
    problems = []
    for room in sorted({path.parent for path in package.rglob("*.py")} - {package}):
        page = room / "__init__.py"
        text = (ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) if page.exists() else None) or ""
        _, _, listing = text.partition("Read in this order:\n\n")
        lines = re.findall(r"^ {4}(\w+(?:, \w+)*) {2,}\S", listing.partition("\n\n")[0], re.MULTILINE)
        listed = {name for line in lines for name in line.split(", ")}
        there = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/*.py")}
        where = f"{page.relative_to(package.parent)}:1: the docstring"
        if missing := sorted(there - listed - {"__init__"}):
            problems.append(f"{where} misses {missing}; list every module below 'Read in this order:'")
        if gone := sorted(listed - there):
            problems.append(f"{where} lists {gone}, which the room does not have")
    return problems


@pytest.mark.parametrize("rule", [upward_imports, circles, incomplete_pages])
def test_the_package_keeps(rule) -> None:
    assert len(modules_of(PACKAGE)) > 60
    broken = rule(PACKAGE)
    assert not broken, "\n" + "\n".join(broken)


PAGE = '"""A room.\n\nRead in this order:\n\n    {}   what it holds\n\nAnd more.\n"""\n'
HOUSE = {
    "__init__": "from house.find.match import match\n",
    "cuda/__init__": PAGE.format("launch"),
    "cuda/launch": "import ast, torch\n",
    "find/__init__": PAGE.format("match, search") + "from house.find.search import search\n",
    "find/match": "def match():\n    from house.cuda import launch\n",
    "find/search": "from house.find.match import match\n",
}


@pytest.mark.parametrize(
    ("name", "text", "rule", "problem"),
    [
        ("cuda/launch", "x = 1\nfrom house.find import match", upward_imports, "house/cuda/launch.py:2: house.cuda.la"),
        ("cuda/launch", "def f():\n    import house", upward_imports, "launch imports house, which is above it; from"),
        ("cuda/launch", "f = import_module('house.find')", upward_imports, "house.cuda.launch imports house.find, "),
        ("find/match", "from house.find.search import f", circles, "house/find/match.py:1: house.find.match imports"),
        ("find/match", "def f():\n    from house.find import x", circles, "imports house.find, a step of"),
        ("find/rules", "", incomplete_pages, "house/find/__init__.py:1: the docstring misses ['rules']"),
        ("find/__init__", PAGE.format("match, search, linear"), incomplete_pages, "lists ['linear'], which"),
        ("find/__init__", '"""match and search"""', incomplete_pages, "docstring misses ['match', 'search']"),
        ("cuda/deep/plan", "", incomplete_pages, "house/cuda/deep/__init__.py:1: the docstring misses ['plan']"),
        ("cuda/deep/plan", "", incomplete_pages, "house/cuda/__init__.py:1: the docstring misses ['deep']"),
    ],
)
def test_what_breaks_a_rule_is_told(tmp_path: Path, name: str, text: str, rule, problem: str) -> None:
    house = tmp_path / "house"

    def build(pages: dict[str, str]) -> None:
        for page, content in pages.items():
            path = house / f"{page}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    build(HOUSE)
    assert rule(house) == []
    build({name: text})
    assert problem in "\n".join(rule(house))


def test_a_room_without_a_floor_is_told() -> None:
    with pytest.raises(AssertionError, match=r"house\.attic\.roof is on no floor: enter 'attic' in FLOORS of tests/te"):
        floor("house.attic.roof")


def test_the_floors_are_those_that_contributing_tells() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (listed,) = (block for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if block.startswith("tables "))
    told = [name for line in listed.splitlines() for name in re.split(r"  +", line)[0].split()]
    rooms = [name for name in FLOORS if (PACKAGE / name).is_dir()]
    assert sorted(told[:6]) == sorted(FLOORS[:6])
    assert told[6:] == rooms
