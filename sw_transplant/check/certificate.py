"""The certificate: what was converted, by what, how far it is from the original, and on which inputs. JSON, versioned.

docs/certificate.md lists the fields.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sw_transplant.check.report import VerifyReport
from sw_transplant.check.rounding import LayerRounding
from sw_transplant.config import SWConfig

CERTIFICATE_NAME = "certificate.json"
SCHEMA = "sw_transplant.certificate"
CERTIFICATE_VERSION = 1
"""Version of the schema. Readers refuse a newer one."""
MAX_BYTES = 64 * 2**20
"""Certificates that are larger are not read."""

_PARTS: dict[str, type | tuple[type, ...]] = {
    "schema": str,
    "version": int,
    "created": str,
    "versions": dict,
    "model": dict,
    "config": (dict, type(None)),
    "weights": dict,
    "layers": list,
    "inputs": dict,
    "run": dict,
    "comparison": dict,
    "files": dict,
    "ok": bool,
    "digest": str,
}
_HASHES = ("original", "converted")


@dataclass(frozen=True)
class Certificate:
    """What is in a ``certificate.json``; ``values`` are the fields of the schema."""

    values: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the comparison and every layer were within their bounds."""
        return bool(self.values["ok"])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON; a file that is there is replaced as a whole.

        Beside the files of a saved model (in their folder), it holds their hashes, too.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files = {file.name: hash_file(file) for file in sorted(path.parent.iterdir()) if _is_of_a_model(file)}
        values = _sealed({**self.values, "files": files if path.name == CERTIFICATE_NAME else {}})
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Certificate:
        """Reads and checks a certificate. Nothing in it is run.

        Raises:
            ValueError: no such file, damaged, changed after it was written, or of a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected a certificate that verify or convert wrote")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected a certificate of at most {MAX_BYTES}")
        try:
            values = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, or no certificate ({error}); verify again to write one") from error
        _check_parts(path, values)
        if values["digest"] != _digest(values):
            raise ValueError(f"{path}: changed since it was written (its digest is another); verify again to write one")
        return cls(values)


def _check_parts(path: Path, values: Any) -> None:
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise ValueError(f"{path}: no certificate: expected a JSON object with schema {SCHEMA!r}")
    version = values.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{path}: version {version!r}, expected an integer of at least 1")
    if version > CERTIFICATE_VERSION:
        raise ValueError(f"{path}: version {version}, this sw_transplant reads up to {CERTIFICATE_VERSION}; upgrade it")
    for name, kind in _PARTS.items():
        if name not in values or not isinstance(values[name], kind):
            raise ValueError(f"{path}: {name!r} is absent or of the wrong kind; verify again to write a certificate")
    for name in _HASHES:
        if not isinstance(values["weights"].get(name), str):
            raise ValueError(f"{path}: 'weights' has no hash {name!r}; verify again to write a certificate")


def certificate(
    original: nn.Module,
    hashes: tuple[str, str],
    report: VerifyReport,
    layers: Iterable[LayerRounding],
    inputs: dict[str, Any],
    config: SWConfig | None,
) -> Certificate:
    """Puts together what :func:`verify` found.

    Args:
        original: for its class.
        hashes: of the weights of the original and of the converted model (:func:`hash_weights`).
        report: the comparison.
        layers: what each layer rounded.
        inputs: which images; numbers and strings.
        config: of the conversion, where known.
    """
    layers = tuple(layers)
    values = {
        "schema": SCHEMA,
        "version": CERTIFICATE_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "sw_transplant": _own_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "model": {
            "class": f"{type(original).__module__}.{type(original).__qualname__}",
            "parameters": sum(parameter.numel() for parameter in original.parameters()),
        },
        "config": None if config is None else config.to_dict(),
        "weights": dict(zip(_HASHES, hashes, strict=True)),
        "layers": [{**asdict(layer), "ok": layer.ok} for layer in layers],
        "inputs": inputs,
        "run": {
            "device": report.device,
            "dtype": report.dtype,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "comparison": report.to_dict(),
        "files": {},
        "ok": report.ok and all(layer.ok for layer in layers),
    }
    return Certificate(_sealed(_without_infinities(values)))


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of a state_dict: names, dtypes, shapes and every bit of the values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            if not tensor.is_meta:
                digest.update(_bytes(tensor))
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file)


def _hash(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def _is_of_a_model(file: Path) -> bool:
    return file.is_file() and (file.suffix == ".safetensors" or file.name in ("sw_config.json", "config.json"))


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "digest": _digest(values)}


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of everything but the digest: it notices damage, and is no signature."""
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_infinities(value: Any) -> Any:
    """JSON has none: None instead."""
    if isinstance(value, dict):
        return {str(name): _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _own_version() -> str:
    return str(sys.modules["sw_transplant"].__version__)  # the package is above this room
