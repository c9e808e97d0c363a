"""What the benchmarks share: tables, results as JSON, the environment of a run, and the options that all have."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import FORMATS, PRECISIONS, Peers

import sw_transplant

# ---- tables, JSON ----------------------------------------------------------------------------------------------------


class Report:
    """A table that is printed row by row, and a JSON file that holds all rows so far at any time.

    A row is a dict. Of its entries the table shows those that are columns; a column that is missing is an empty cell,
    ``-`` in the table and null in the file. ``row["reasons"]`` says why by column, or by "row" for all of them.

    Args:
        columns: names, with the least width of each.
        head: what the file says beside the rows.
        file: where to; None for nowhere.
        minutes: measure no other row after so long; None for no limit.
    """

    def __init__(
        self, columns: Mapping[str, int], head: dict[str, Any], file: Path | None, minutes: float | None = None
    ) -> None:
        self.widths = {name: max(width, len(name)) for name, width in columns.items()}
        self.head, self.file = head, file
        self.rows: list[dict[str, Any]] = []
        self._minutes, self._begin = minutes, time.monotonic()
        self._print({name: name for name in columns})
        self._write()

    def measure(self, known: dict[str, Any], function: Callable[[], list[dict[str, Any]]]) -> None:
        """Adds the rows that a function measures. Should it fail, or time be up, one row of what is known, and why.

        Args:
            known: the entries that say what is measured; added to every row.
            function: measures the other entries.
        """
        if self._minutes is not None and time.monotonic() - self._begin > 60 * self._minutes:
            rows = [{"reasons": {"row": f"not measured: --minutes {self._minutes:g} had gone by"}}]
        else:
            peers = Peers()
            rows = peers.attempt("row", function) or [{"reasons": peers.reasons}]
        for row in rows:
            self.add({**known, **row})

    def add(self, row: dict[str, Any]) -> None:
        """Prints a row and writes it."""
        empty: dict[str, Any] = dict.fromkeys(self.widths)
        self.rows.append({**empty, **row})
        self._print(self.rows[-1])
        self._write()

    def _print(self, row: dict[str, Any]) -> None:
        print("  ".join(_cell(row[name]).rjust(width) for name, width in self.widths.items()), flush=True)

    def _write(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        written = self.file.with_name(self.file.name + ".part")  # a run that is cut short leaves a whole file
        written.write_text(json.dumps(_finite({**self.head, "rows": self.rows}), indent=1) + "\n")
        written.replace(self.file)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: these become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


# ---- the command line ------------------------------------------------------------------------------------------------


def parser(
    description: str | None, *, repeats: tuple[int, int], seconds: float | None, device: bool = True
) -> argparse.ArgumentParser:
    """The options that every benchmark has.

    Args:
        description: the module's docstring.
        repeats: rounds on a GPU and on a CPU.
        seconds: for one row; None where only the rounds count.
        device: whether there is a choice of one; else it is the CPU.
    """
    gpu = torch.cuda.is_available()
    new = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        new.add_argument("--device", default="cuda" if gpu else "cpu", help="cpu, cuda, cuda:1, ...")
    new.add_argument("--repeats", type=positive, default=repeats[0 if gpu else 1], help="rounds at most (%(default)s)")
    if seconds is not None:
        new.add_argument("--seconds", type=float, default=seconds, help="time for the rounds of one row (%(default)s)")
    new.add_argument("--minutes", type=float, help="measure no other row after so long")
    new.add_argument("--json", type=Path, help="write the results to this file")
    return new


def use_device(name: str) -> torch.device:
    """The device of this name; a GPU becomes the current one, so that events and memory are its own."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def positive(text: str) -> int:
    """An option's value: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def cudnn_option(new: argparse.ArgumentParser) -> None:
    """Adds ``--cudnn-benchmark``."""
    new.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms and choose")


def forms_option(new: argparse.ArgumentParser, known: Sequence[str], default: Sequence[str]) -> None:
    """Adds ``--forms``."""
    new.add_argument("--forms", nargs="+", choices=known, default=list(default), help="execution forms")


def dtypes_option(new: argparse.ArgumentParser) -> None:
    """Adds ``--dtypes``."""
    new.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))


def formats_option(new: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Adds ``--formats``."""
    new.add_argument("--formats", nargs="+", choices=FORMATS, default=list(default), help="memory format of the input")


def environment(program: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the code: device, versions, threads, switches, and the command."""
    gpu = device.type == "cuda"
    return {
        "command": shlex.join(["python", f"benchmarks/{program}", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "sw-transplant": sw_transplant.__version__,
        "torch": torch.__version__,
        **{name: _version(name) for name in ("numba", "numba-cuda", "timm")},
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
