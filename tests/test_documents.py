"""What the documents say is there: links, files, functions, make targets, rooms, floors; and their examples run."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sw_transplant"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
SINGLE_FILES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))

FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
ELSEWHERE = ("https://", "http://", "mailto:")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(document: Path) -> str:
    """A document without its blocks of code."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def blocks(document: Path, language: str) -> list[str]:
    """The blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document in links."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(document), re.MULTILINE)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def targets_in(text: str) -> set[str]:
    """The targets of the calls of make in a text of commands."""
    calls = re.findall(r"(?:^|[`;&]) *make +([^`#\n;&]+)", text, re.MULTILINE)
    return {word for call in calls for word in call.split() if re.fullmatch(r"[a-z][a-z-]*", word)}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module_name, rest = name, []
    while True:
        try:
            found = importlib.import_module(module_name)
            break
        except ModuleNotFoundError:
            if "." not in module_name:
                return False
            module_name, _, last = module_name.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def defined_in(file: Path) -> set[str]:
    """Names of functions, classes and assignments anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def local_file(words: str) -> Path | None:
    """The file or folder that code in a document names: from the top, or from a room. None for what names none."""
    path = words.split("::")[0]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", path) or "..." in path:
        return None
    top = path.split("/")[0]
    if top in {entry.name for entry in ROOT.iterdir()} and ("/" in path or "." in path.strip(".")):
        return ROOT / path
    return PACKAGE / path if top in ROOMS and path.endswith(".py") else None


# ---- links and names ------------------------------------------------------------------------------------------------


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in LINK.findall(prose(document)):
        if target.startswith(ELSEWHERE):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


@every_document
def test_files_that_are_named_exist(document: Path) -> None:
    files = {words: local_file(words) for words in CODE.findall(prose(document))}
    assert [words for words, path in files.items() if path is not None and not path.exists()] == []


@every_document
def test_functions_are_where_the_document_says(document: Path) -> None:
    """`name` in `file.py`, also `name` and `other` in `file.py`, and (`name` in `file.py`)."""
    wrong = []
    for names, file in re.findall(r"((?:`\w+`(?:,| and| or)?\s+)+)in\s+`([\w./]+\.py)`", prose(document)):
        path = local_file(file)
        assert path is not None, file
        wrong += [f"{name} in {file}" for name in CODE.findall(names) if name not in defined_in(path)]
    assert wrong == []


def test_contributing_names_many_files_and_functions() -> None:
    """The tests above look at something."""
    text = prose(ROOT / "CONTRIBUTING.md")
    assert sum(local_file(words) is not None for words in CODE.findall(text)) > 40
    assert len(re.findall(r"`\w+`\s+in\s+`[\w./]+\.py`", text)) > 15


@every_document
def test_dotted_names_can_be_imported(document: Path) -> None:
    pytest.importorskip("timm", reason="some of the names are those of networks")
    text = prose(document)
    if document.name == "CHANGELOG.md":  # its first column is what is no more
        text = re.sub(r"^ *\| `[\w.]+`( \(the module\))? \|", "", text, flags=re.MULTILINE)
    names = {words.split("(")[0] for words in CODE.findall(text) if re.match(r"sw_transplant(\.\w+)+(\(|$)", words)}
    assert sorted(name for name in names if not resolves(name)) == []


def test_what_moved_is_no_longer_where_it_was() -> None:
    moved = re.findall(
        r"^ *\| `([\w.]+)`(?: \(the module\))? \| `([\w.]+)` \|$", prose(ROOT / "CHANGELOG.md"), re.MULTILINE
    )
    assert len(moved) > 25
    assert [old for old, _ in moved if (ROOT / f"{old.replace('.', '/')}.py").exists()] == []
    assert [new for _, new in moved if not (ROOT / f"{new.replace('.', '/')}.py").exists()] == []


@every_document
def test_make_targets_exist(document: Path) -> None:
    commands = "\n".join([*CODE.findall(prose(document)), *blocks(document, "sh")])
    assert sorted(targets_in(commands) - make_targets()) == []


def test_calls_of_make_are_found() -> None:
    assert targets_in("make lint  # style") == {"lint"}
    assert targets_in("x; make -j2 test-all PYTHON=python3") == {"test-all"}
    assert {"help", "demo", "test", "lint", "pytest"} <= make_targets()


def test_markers_that_are_named_are_declared() -> None:
    declared = re.findall(r'^ {4}"(\w+): ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.search(r"^Three markers (.+?)\.", prose(ROOT / "CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    assert named is not None
    assert sorted(CODE.findall(named[1])) == sorted(declared)


# ---- rooms and floors -----------------------------------------------------------------------------------------------


def test_the_readme_has_a_line_for_each_room() -> None:
    _, _, layout = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Layout\n")
    rows = re.findall(r"^\| (`.+?`) \|", layout, re.MULTILINE)
    named = [name for row in rows for name in CODE.findall(row)]
    assert sorted(named) == sorted([*(f"{room}/" for room in ROOMS), *(f"{name}.py" for name in SINGLE_FILES)])


def floors() -> list[list[str]]:
    """The list of CONTRIBUTING, from the floor that everybody may import upwards."""
    (listed,) = [block for block in blocks(ROOT / "CONTRIBUTING.md", "text") if block.startswith("tables ")]
    return [re.split(r"  +", line)[0].split() for line in listed.splitlines()]


def test_every_room_is_on_a_floor() -> None:
    assert sorted(name for floor in floors() for name in floor) == sorted([*ROOMS, *SINGLE_FILES])


# ---- design pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["docs", "docs/design"])
def test_the_index_lists_every_page(folder: str) -> None:
    index = ROOT / folder / "README.md"
    listed = {target.partition("#")[0] for target in LINK.findall(prose(index))}
    pages = {page.name for page in index.parent.glob("*.md")} - {"README.md"}
    assert sorted(pages - listed) == []


def test_the_site_has_every_page() -> None:
    listed = re.findall(
        r"^ +- (?:.+?: )?([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(name for name in listed if not name.startswith("project/")) == sorted(pages)
    assert [name for name in listed if name.startswith("project/") and not (ROOT / Path(name).name).is_file()] == []


EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs" / "design").glob("*.md"))
    for number, block in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_examples_of_the_design_pages_run(block: str) -> None:
    assert "assert " in block
    if "sw_transplant.cuda" in block:
        pytest.importorskip("numba.cuda", reason="the CUDA extra is not installed")
    exec(compile(block, "example", "exec"), {"__name__": "example"})


# ---- what other programs read ---------------------------------------------------------------------------------------


def read_yaml(name: str) -> dict:
    """A YAML file of the project; its keys are strings, also "on"."""
    content = yaml.load((ROOT / name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    assert isinstance(content, dict)
    return content


def test_the_citation_has_what_cff_asks_for() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= citation.keys()
    assert resolves("sw_transplant.__version__")
    assert citation["version"] == importlib.import_module("sw_transplant").__version__
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year"} <= paper.keys()
        authors = ", ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"])
        assert f"{authors}: *{paper['title']}*" in readme
        assert f"({paper['url']})" in readme


def test_the_workflow_runs_targets_that_exist() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    assert {"push", "pull_request", "schedule"} <= workflow["on"].keys()
    assert workflow["concurrency"]["cancel-in-progress"] == "true"
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert all(command.startswith("make ") for command in commands)
    targets = targets_in("\n".join(commands))
    assert {"lint", "pytest", "test-all"} <= targets
    assert sorted(targets - make_targets()) == []


def test_the_workflow_covers_the_oldest_python() -> None:
    lowest = re.search(r'^requires-python = ">=(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert lowest is not None
    versions = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert versions[0] == lowest[1]


def test_the_hooks_use_the_ruff_of_the_environment() -> None:
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    ruff = [hook["entry"].split() for hook in hooks if "ruff" in hook["entry"]]
    assert [entry[:2] for entry in ruff] == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"]]
    assert re.search(r"^VENV \?= \.venv$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_source_distribution_has_every_document() -> None:
    include = re.search(r"sdist\]\ninclude = \[(.+?)\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL)
    assert include is not None
    included = set(re.findall(r'"/([^"]+)"', include[1]))
    wanted = {path.name for path in ROOT.glob("*.md")} | {
        "CITATION.cff",
        "Makefile",
        "docs",
        "tests",
        "constraints.txt",
    }
    assert sorted(wanted - included) == []
    assert [name for name in included if not (ROOT / name).exists()] == []
