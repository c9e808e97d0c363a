"""Libraries whose models write folders of their own, and have to know when layers of a model were exchanged.

A model of transformers is saved by its ``save_pretrained`` and read by ``from_pretrained``. What these need to know of
Shiftwise layers is told in room ``hf``. That room stands above this one, is optional and slow to import, so nothing may
import it unasked: here it has a name only. It is imported when a model is at hand whose class comes from that library;
then the library is there already.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

METHOD = "shiftwise"
"""The name under which libraries know this package."""

_ROOMS = {"transformers": "sw_transplant.hf"}
_HOSTS: dict[str, Host] = {}


class Host(Protocol):
    """What a room does for the models of a library."""

    def check(self, model: nn.Module) -> None:
        """Raises ValueError where layers of the model must not be exchanged; before any is."""

    def follow(self, model: nn.Module, strange: Sequence[str] = ()) -> None:
        """Notes which layers of a model are Shiftwise now.

        Args:
            model: changed in place: what its library keeps in it, not its layers.
            strange: layers that are plain again and have other names or shapes than the original.
        """

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
    return [_HOSTS[library] for library in libraries]
