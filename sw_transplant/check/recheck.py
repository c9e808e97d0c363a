"""A certificate checked again: the files beside it, and, with the original model, everything it says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sw_transplant.check.certificate import CERTIFICATE_NAME, Certificate, hash_file, hash_tensors, hash_weights
from sw_transplant.check.verify import verify
from sw_transplant.surgery.io import load
from sw_transplant.tables import render_table


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; ``ok`` None where it could not be."""

    what: str
    ok: bool | None
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check_folder` found; printing it gives a table."""

    folder: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return all(finding.ok is not False for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        findings = [{"what": f.what, "ok": f.ok, "detail": f.detail} for f in self.findings]
        return {"folder": self.folder, "ok": self.ok, "findings": findings}

    def __str__(self) -> str:
        words = {True: "ok", False: "FAILED", None: "not checked"}
        rows = [[finding.what, words[finding.ok], finding.detail] for finding in self.findings]
        table = render_table(f"Certificate in {self.folder}", ["what", "", "detail"], rows)
        return f"{table}\n{'OK' if self.ok else 'FAILED'}: {self.folder}"


def check_folder(folder: str | os.PathLike[str], original: nn.Module | None = None) -> CheckReport:
    """Checks the certificate of a saved model again.

    Args:
        folder: with a ``certificate.json`` and the files of the model that it was written beside.
        original: the model that was converted, with its weights. With it the saved model is loaded and compared anew;
            without it only files and hashes are looked at. It stays as it is.

    Returns:
        What was found. Damage of the model's files is a finding.

    Raises:
        ValueError: no certificate, a damaged one, or one of a newer version; with ``original``, a folder that does not
            fit that model.
    """
    folder = Path(folder)
    values = Certificate.read(folder / CERTIFICATE_NAME).values
    versions = values["versions"]
    written = f"sw_transplant {versions.get('sw_transplant')}, torch {versions.get('torch')}, {values['created']}"
    findings = [
        Finding("the certificate", True, f"version {values['version']}; {written}"),
        Finding("its verdict", values["ok"], _verdict(values)),
        *_files(folder, values["files"]),
    ]
    if original is None:
        findings.append(Finding("the comparison", None, "give the original model to repeat it"))
    else:
        findings += _again(folder, original, values)
    return CheckReport(str(folder), tuple(findings))


def _verdict(values: dict[str, Any]) -> str:
    reasons = values["comparison"].get("reasons")
    beyond = [layer.get("path") for layer in values["layers"] if isinstance(layer, dict) and not layer.get("ok")]
    text = " ".join(map(str, reasons)) if isinstance(reasons, list) else ""
    return f"{text} Layers beyond their bound: {', '.join(map(str, beyond)) or 'none'} of {len(values['layers'])}."


def _files(folder: Path, hashes: dict[str, Any]) -> list[Finding]:
    if not hashes:
        return [Finding("files", None, "the certificate was not written into the folder of a saved model")]
    findings = []
    for name, expected in sorted(hashes.items()):
        if Path(name).name != name:
            findings.append(Finding(name, False, "not the name of a file in this folder"))
        elif not (folder / name).is_file():
            findings.append(Finding(name, False, "no such file"))
        else:
            same = hash_file(folder / name) == expected
            findings.append(Finding(name, same, "as certified" if same else "changed since it was certified"))
    return findings


def _again(folder: Path, original: nn.Module, values: dict[str, Any]) -> list[Finding]:
    try:
        converted = load(original, folder)
    except ValueError as error:
        return [Finding("loading it", False, str(error))]
    findings = []
    for whose, model in (("original", original), ("converted", converted)):
        same = hash_weights(model) == values["weights"][whose]
        findings.append(Finding(f"weights of the {whose} model", same, "as certified" if same else "other weights"))
    shape, seed, dtype = _inputs(values)
    noise = [torch.randn(shape, generator=generator) for generator in [torch.Generator().manual_seed(seed)] * 2]
    report = verify(original, converted, noise, dtype=dtype, seed=seed, progress=False)
    findings.append(Finding("the comparison, again", report.ok, " ".join(report.reasons)))
    if values["inputs"].get("kind") == "noise":
        same = [hash_tensors([batch]) for batch in noise] == values["inputs"].get("batches")
        findings.append(Finding("its inputs", same or None, "the same" if same else "noise of another generator"))
    else:
        findings.append(Finding("its inputs", None, f"noise of shape {shape}; the certificate's were images"))
    return findings


def _inputs(values: dict[str, Any]) -> tuple[tuple[int, ...], int, torch.dtype]:
    shape, seed = values["inputs"].get("shape"), values["inputs"].get("seed")
    dtype = getattr(torch, str(values["run"].get("dtype")), None)
    numbers = isinstance(shape, list) and len(shape) == 4 and all(type(size) is int and size > 0 for size in shape)
    if not numbers or type(seed) is not int or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{CERTIFICATE_NAME}: inputs of shape {shape!r} and seed {seed!r} in {dtype!r}, expected (N, C, H, W), an "
            f"integer and a dtype; verify again to write one"
        )
    return tuple(shape), seed, dtype
