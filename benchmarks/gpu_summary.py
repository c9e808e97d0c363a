"""One page of what gpu_day.py has found so far, made from its files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

COLUMNS = {
    "kernels_*.json": [
        "layer",
        "dtype",
        "pass",
        "format",
        "native",
        "native_cl",
        "auto",
        "auto_runs",
        "auto_speedup",
        "of_floor",
        "timed",
    ],
    "throughput_*.json": [
        "model",
        "form",
        "dtype",
        "batch",
        "native",
        "native_compiled",
        "converted",
        "converted_compiled",
        "ratio",
        "compiled_ratio",
    ],
    "training*.json": [
        "subject",
        "form",
        "dtype",
        "batch",
        "native",
        "converted",
        "ratio",
        "native_peak_MiB",
        "peak_MiB",
    ],
}
"""The columns that are shown of each file; an underline stands for a space."""


def write_summary(folder: Path, stages: Sequence[str]) -> str:
    """Writes summary.md from the files in a folder; returns its text. What is missing or broken is said so."""
    parts = [f"# {folder.name}", "", *_table(["stage", "outcome", "seconds", "steps"], _stages(folder, stages))]
    parts += _facts(folder)
    parts += _correct(folder)
    for pattern, names in COLUMNS.items():
        columns = [name.replace("_", " ") for name in names]
        for file in sorted(folder.glob(pattern)):
            rows = _read(file).get("rows", [])
            shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
            cells = [[_cell(row.get(name)) for name in shown] for row in rows]
            parts += ["", f"## {file.stem}", "", *(_table(shown, cells) if cells else ["Nothing was measured."])]
    text = "\n".join(parts) + "\n"
    part = folder / "summary.part"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / "summary.md")
    return text


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _stages(folder: Path, stages: Sequence[str]) -> list[list[str]]:
    rows = []
    for name in stages:
        status = _read(folder / f"{name}.status.json")
        steps = "; ".join(f"{step['step']} {step['outcome']}".strip() for step in status.get("steps", []))
        rows.append([name, status.get("outcome", "not run"), str(status.get("seconds", "")), steps])
    return rows


def _facts(folder: Path) -> list[str]:
    processes = {name: _read(folder / f"facts_{name}.json") for name in ("first", "second")}
    whats = list(processes["first"].get("seconds", {}))
    if not whats:
        return []
    rows = [[what, *(_cell(found.get("seconds", {}).get(what)) for found in processes.values())] for what in whats]
    rows.append(["Numba was imported", *(str(found.get("Numba was imported", "")) for found in processes.values())])
    problems = [f"{name}: {said}" for name, said in processes["first"]["problems"].items() if said]
    calls = processes["first"].get("microseconds of a call", {})
    python = ", ".join(f"{name} {value:.0f} us" for name, value in calls.items())
    return [
        "", "## First use, seconds", "", processes["first"].get("device", ""), "",
        *_table(["what", "first process", "second process"], rows), "",
        f"A call in Python: {python}.", *problems,
    ]  # fmt: skip


def _correct(folder: Path) -> list[str]:
    rows = _read(folder / "correct.json").get("rows", [])
    parts = []
    if rows:
        wrong = [row for row in rows if not row["fine"]]
        parts = ["", "## Right or wrong", "", f"{len(rows) - len(wrong)} of {len(rows)} layers are right."]
        names = ["layer", "dtype", "format", "errors", "same bits", "kernel", "reason"]
        if wrong:
            parts += ["", *_table(names, [[_cell(row.get(name)) for name in names] for row in wrong])]
    with suppress(OSError, ElementTree.ParseError):
        suites = list(ElementTree.parse(folder / "tests.xml").getroot().iter("testsuite"))
        counts = {
            name: sum(int(suite.get(name, 0)) for suite in suites)
            for name in ("tests", "failures", "errors", "skipped")
        }
        parts += ["", ", ".join(f"{count} {name}" for name, count in counts.items()) + "."]
    return parts


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return "" if value is None else str(value)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
