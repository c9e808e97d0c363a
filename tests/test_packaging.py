"""What an import loads, and that the project names no machine."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sw_transplant

ROOT = Path(__file__).resolve().parents[1]

# What an import of the package must leave alone: optional, slow, or both.
HEAVY_MODULES = {
    *("matplotlib", "numba", "numba_cuda", "onnx", "PIL", "rich", "sklearn", "timm", "torchvision", "transformers")
}

IMPORT_PROBE = """
import json, sys
import torch
before = set(sys.modules)
import sw_transplant
import sw_transplant.check.images, sw_transplant.check.verify, sw_transplant.ops, sw_transplant.ops.toeplitz
added = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"added": added, "cuda": torch.cuda.is_initialized()}))
"""


def test_import_loads_no_heavy_module_and_starts_no_cuda() -> None:
    probe = [sys.executable, "-c", IMPORT_PROBE]
    imported = json.loads(subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert "sw_transplant" in imported["added"]
    assert HEAVY_MODULES.isdisjoint(imported["added"])
    assert not imported["cuda"]


def test_version_is_that_of_the_project() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert sw_transplant.__version__ == version[1]


# Written in pieces, so that this file itself is clean.
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:work|tmp|root|home|mnt)/")
INDEX_HOST = re.compile("|".join(["pypi[.]org", "python" + "hosted[.]org", "download[.]pytorch" + "[.]org"]))


def project_files() -> list[Path]:
    """Every file that is tracked, or would be if it were added; skips outside a git checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know the files of the project")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_an_index() -> None:
    files = project_files()
    assert ROOT / "pyproject.toml" in files
    contents = {path: path.read_bytes() for path in files}
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path, content in contents.items()
        if b"\0" not in content  # a NUL byte marks a binary file, as in git
        for pattern in (MACHINE_PATH, INDEX_HOST)
        for match in pattern.finditer(content.decode(errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize("name", ["work", "tmp"])
def test_machine_paths_are_told_from_relative_ones(name: str) -> None:
    assert MACHINE_PATH.search(f'open("/{name}/model.onnx")')
    assert not MACHINE_PATH.search(f"examples/{name}/model.onnx")
