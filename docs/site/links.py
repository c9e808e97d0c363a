"""Hooks of mkdocs: what the pages link to outside of docs/ comes along, and roles of docstrings become plain code.

Pages are written for whoever reads them as files, so they link to ../README.md and ../examples/demo.py. On the site the
pages of the root are pages of the folder project/, and other files lie there as they are.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PLACE = "project"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):(<code>|`)~?")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
ELSEWHERE = ("http://", "https://", "mailto:", "#", "data:")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root, and every file that a page links to outside of docs/."""
    wanted = {ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
    pages = [*DOCS.rglob("*.md"), *wanted]
    wanted |= {target for page in pages for target in _targets(page) if _is_outside(target) and target.is_file()}
    for path in sorted(wanted):
        uri = f"{PLACE}/{path.relative_to(ROOT).as_posix()}"
        if path.suffix == ".md":
            files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites the links of a page to where their targets are on the site."""
    uri = page.file.src_uri
    source = ROOT / uri.removeprefix(f"{PLACE}/") if uri.startswith(f"{PLACE}/") else DOCS / uri

    def rewritten(match: re.Match[str]) -> str:
        target = match[2]
        if target.startswith(ELSEWHERE):
            return match[0]
        path, mark, anchor = target.partition("#")
        there = (source.parent / path).resolve()
        if there.is_dir():
            there = there / "README.md"
            if not there.is_file():
                return f"{match[1]}{_relative(uri, 'README.md')}{match[3]}"  # a folder of the sources: no page
        return f"{match[1]}{_relative(uri, _uri_of(there))}{mark}{anchor}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.lstrip().startswith("```") else LINK.sub(rewritten, part) for part in parts)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Sphinx's roles in docstrings: their text is code already."""
    return ROLE.sub(r"\1", html)


def _targets(page: Path) -> list[Path]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = [match[2].partition("#")[0] for match in LINK.finditer(text) if not match[2].startswith(ELSEWHERE)]
    return [(page.parent / target).resolve() for target in found if target]


def _is_outside(path: Path) -> bool:
    return path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)


def _uri_of(path: Path) -> str:
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{PLACE}/{path.relative_to(ROOT).as_posix()}"


def _relative(page: str, target: str) -> str:
    up = "../" * page.count("/")
    return up + target
