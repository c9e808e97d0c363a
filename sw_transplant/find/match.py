"""What the search finds, as data: matches, skipped layers, and their table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from sw_transplant.config import is_count
from sw_transplant.geometry import BranchGeometry, Size
from sw_transplant.tables import render_table


class NoLargeKernelError(ValueError):
    """Nothing in the model could be converted; the message says what was looked at and why it was left."""


def join_path(path: str, name: str) -> str:
    """The path of a part; an empty path or name is the module itself."""
    return ".".join(part for part in (path, name) if part)


@dataclass(frozen=True)
class SourceBranch:
    """One depthwise convolution (or the identity) of the replaced module, by the names it has there.

    Attributes:
        weight: parameter of shape ``(C_out, 1, kh, kw)``, a path inside the replaced module; None for the identity.
        bias: path of the convolution's bias, or None.
        bn: path of the BatchNorm that follows, or None.
        geometry: kernel, padding, dilation.
        tile: side of the tiles that take its place.
    """

    weight: str | None
    bias: str | None
    bn: str | None
    geometry: BranchGeometry
    tile: int


@dataclass(frozen=True)
class Match:
    """A module that is a large depthwise convolution, or a sum of parallel ones, and can be replaced as a whole.

    Attributes:
        path: where it stands in the model; ``""`` for the model itself.
        aliases: further places that hold the same object.
        type_name: class of the module.
        in_channels, out_channels, stride: of the convolution.
        branches: its parallel branches, in the order of their sum.
        parameters_before, parameters_after: numbers of parameters, those of BatchNorms included.
        edges: how many orders place the tiles of a laid-out branch; all but the first start at a gain of 0.
    """

    path: str
    aliases: tuple[str, ...]
    type_name: str
    in_channels: int
    out_channels: int
    stride: Size
    branches: tuple[SourceBranch, ...]
    parameters_before: int
    parameters_after: int
    edges: int = 1

    @property
    def geometries(self) -> tuple[BranchGeometry, ...]:
        """Those of the branches."""
        return tuple(branch.geometry for branch in self.branches)

    def to_dict(self) -> dict[str, Any]:
        """The match, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Match:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: fields are missing, unknown or of the wrong kind.
        """
        try:
            branches = tuple(
                SourceBranch(**{**branch, "geometry": _geometry(branch["geometry"])}) for branch in values["branches"]
            )
            stride, aliases = tuple(values["stride"]), tuple(values["aliases"])
            match = cls(**{**values, "branches": branches, "stride": stride, "aliases": aliases})
        except (KeyError, TypeError) as error:
            raise ValueError(f"layer {values!r:.80}: not the description of a converted layer ({error})") from error
        match._check()
        return match

    def _check(self) -> None:
        """Raises ValueError for a field of another kind than it should be: a file may say anything."""
        if not any(branch.weight for branch in self.branches):
            raise ValueError(f"layer {self.path!r}: branches: none of {len(self.branches)} has a weight, expected one")
        parts: list[Match | SourceBranch] = [self, *self.branches]
        for part in parts:
            where = f"layer {self.path!r}" + (": branch" if part is not self else "")
            for field in fields(part):
                value = getattr(part, field.name)
                if (expected := _KINDS.get(field.name)) and not expected[1](value):
                    raise ValueError(f"{where}: {field.name}: got {value!r}, expected {expected[0]}")


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("path", "type_name"), ("a string", _is_text)),
    **dict.fromkeys(("weight", "bias", "bn"), ("the name of a part, or null", _is_name)),
    **dict.fromkeys(("in_channels", "out_channels", "edges", "tile"), ("an integer of at least 1", is_count)),
    "aliases": ("a list of strings", lambda value: all(map(_is_text, value))),
    "stride": ("two integers of at least 1", lambda value: len(value) == 2 and all(map(is_count, value))),
}
"""What the fields of a match and of its branches are, in words, and whether a value is."""


def _geometry(values: dict[str, Any]) -> BranchGeometry:
    padding = values["padding"]
    numbers = [*values["kernel_size"], *values["dilation"], *([] if padding == "same" else padding)]
    if any(type(number) is not int for number in numbers):  # 1.0 and True are equal to 1, and no sizes
        raise TypeError(f"geometry {values!r:.80}, expected integers")
    return BranchGeometry(
        tuple(values["kernel_size"]), padding if padding == "same" else tuple(padding), tuple(values["dilation"])
    )


@dataclass(frozen=True)
class Skipped:
    """A layer that looks like a candidate and is left as it is, with the reason."""

    path: str
    type_name: str
    kernel_size: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Inspection:
    """The result of :func:`sw_transplant.inspect_model`; printing it gives a table.

    Attributes:
        matches: what will be replaced.
        skipped: what will not, each with its reason.
        converted: paths of layers that are Shiftwise already.
        notes: what in the model's own code may notice the replacement (:mod:`notes`).
    """

    matches: tuple[Match, ...]
    skipped: tuple[Skipped, ...]
    converted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The inspection, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = []
        if self.matches:
            headers = ["layer", "kernels", "stride", "dilation", "channels", "tiles", "parameters", "as Shiftwise"]
            rows = [_match_row(match) for match in self.matches]
            before, after = (
                sum(getattr(m, f"parameters_{when}") for m in self.matches) for when in ("before", "after")
            )
            rows.append([f"{len(self.matches)} layers", "", "", "", "", "", f"{before:,}", f"{after:,}"])
            parts.append(render_table("Large depthwise convolutions to convert", headers, rows))
        elif not self.converted:
            parts.append("No large depthwise convolution to convert.")
        if self.converted:
            parts.append(f"{len(self.converted)} layers are Shiftwise already: {_first(self.converted)}")
        if self.skipped:
            counts = Counter((skipped.reason, skipped.type_name, skipped.kernel_size) for skipped in self.skipped)
            rows = []
            for (reason, type_name, kernel), count in counts.items():
                paths = [
                    s.path
                    for s in self.skipped
                    if (s.reason, s.type_name, s.kernel_size) == (reason, type_name, kernel)
                ]
                rows.append([_first(paths, 1), type_name, _times(kernel), str(count), reason])
            parts.append(render_table("Left as they are", ["layer", "class", "kernel", "count", "reason"], rows))
        parts += [f"Note: {note}." for note in self.notes]
        return "\n".join(parts)


def _match_row(match: Match) -> list[str]:
    geometries = [branch.geometry for branch in match.branches]
    kernels = " + ".join(
        "identity" if branch.weight is None else _times(branch.geometry.kernel_size) for branch in match.branches
    )
    tiles = sum(
        -(-g.kernel_size[0] // b.tile) * -(-g.kernel_size[1] // b.tile)
        for g, b in zip(geometries, match.branches, strict=True)
    )
    channels = (
        str(match.in_channels)
        if match.in_channels == match.out_channels
        else f"{match.in_channels} -> {match.out_channels}"
    )
    dilations = sorted({max(g.dilation) for g in geometries})
    return [
        (match.path or "(the model)") + (f" (+{len(match.aliases)} alias)" if match.aliases else ""),
        kernels,
        _times(match.stride),
        ", ".join(map(str, dilations)),
        channels,
        f"{tiles} of {_times((match.branches[0].tile,) * 2)}",
        f"{match.parameters_before:,}",
        f"{match.parameters_after:,}",
    ]


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "?"


def _first(paths: tuple[str, ...] | list[str], count: int = 3) -> str:
    shown = ", ".join(path or "(the model)" for path in paths[:count])
    return shown + (", ..." if len(paths) > count else "")
