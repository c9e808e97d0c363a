"""Libraries whose models write folders of their own, and have to know when layers of a model were exchanged.

A model of transformers is saved by its ``save_pretrained`` and read by ``from_pretrained``. What these need to know of
Shiftwise layers is told in room ``hf``. That room stands above this one, is optional and slow to import, so nothing may
import it unasked: here it has a name only. It is imported when a model is at hand whose class comes from that library,
or when the library is there already: the model at hand may become a part of one of its models.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

METHOD = "shiftwise"
"""The name under which libraries know this package."""

_ROOMS = {"transformers": "sw_transplant.hf"}
_SIGNS = {"transformers.modeling_utils": "transformers"}
"""Modules that are imported where models of a library can be."""
_HOSTS: dict[str, Host] = {}


class Host(Protocol):
    """What a room does for the models of a library."""

    def check(self, model: nn.Module) -> None:
        """Raises ValueError where layers of the model must not be exchanged; before any is."""

    def follow(self, model: nn.Module) -> None:
        """Notes in a model which layers of it are Shiftwise now."""

    def saves(self, model: nn.Module) -> bool:
        """Whether this very model, and not only a part of it, is written by the library."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes a converted model as the library does."""

    def read(self, base_model: nn.Module, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]] | None:
        """Descriptions of the layers (:mod:`description`), and the state_dict; None where the library wrote nothing."""


def is_host_folder(folder: Path) -> bool:
    """Whether a folder holds a converted model that its library wrote; no library is needed to tell."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def add_host(library: str, host: Host) -> None:
    """Makes a host known; the room does so when it is imported."""
    _HOSTS[library] = host


def hosts_of(model: nn.Module) -> list[Host]:
    """The hosts of the libraries that a model, or a part of it, comes from."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    libraries = sorted({base.__module__.partition(".")[0] for base in classes} & _ROOMS.keys())
    for library in libraries:
        importlib.import_module(_ROOMS[library])
    import_rooms()
    return [_HOSTS[library] for library in libraries]


def import_rooms() -> bool:
    """Imports the rooms of the libraries that are there.

    Returns:
        Whether there was one that had not been imported yet.
    """
    missing = [_ROOMS[library] for sign, library in _SIGNS.items() if sign in sys.modules]
    missing = [room for room in missing if room not in sys.modules]
    for room in missing:
        with suppress(ImportError):  # a library too old for its room; its own models have asked for the room before
            importlib.import_module(room)
    return bool(missing)
