"""How a model is converted: one frozen, versioned dataclass."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal, cast, get_args

CONFIG_VERSION = 1
"""Version of the JSON form of :class:`SWConfig` and of ``sw_config.json``. Readers refuse a newer one."""

Mode = Literal["laid_out", "shiftwise"]
Form = Literal["auto", "shift", "assembled", "gemm", "toeplitz"]
Nonfinite = Literal["anywhere", "local"]
GhostBudget = Literal["layer", "global"]
OrderRule = Literal["random", "opposite"]
Guarantee = Literal["deterministic", "exact", "no_fallback"]
PerLayer = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
PER_LAYER = ("form", "guarantee", "nonfinite")
"""Fields that :attr:`SWConfig.layers` may set for layers of their own."""


@dataclass(frozen=True)
class SWConfig:
    """What :func:`sw_transplant.surgery.convert` looks for, and what it puts in its place.

    Args:
        mode: ``"laid_out"``: the exact rewriting of every large kernel as tiles and placements. The function of the
            model is preserved in eval and in train mode. ``"shiftwise"``: the paper's module
            (:class:`sw_conv2d.SWConv2d`), one bank for both strips, brought as close to the original kernels as least
            squares can; approximate by construction, to be fine-tuned.
        min_kernel: a depthwise convolution is large when its longer side has at least this many taps.
        tile: side n of the square tiles; ``None`` picks the side per layer (:func:`equivalence.choose_tile`) in mode
            ``"laid_out"``, and 3 in mode ``"shiftwise"``. The paper's laid-out experiment uses 5, its final models 3.
        form: how the modules run, see :mod:`sw_transplant.forms`. ``"shift"`` is the paper's operator: small
            convolutions, then shift and add. ``"assembled"`` shifts the weights instead of the features: one depthwise
            convolution, no extra memory. ``"toeplitz"`` multiplies the same kernels as banded Toeplitz matrices, on
            tensor cores where a GPU has them. ``"gemm"`` takes a whole small map at once, as one matrix product per
            channel. ``"auto"`` chooses for each call (:mod:`sw_transplant.forms.dispatch`). All give the same
            function; it can be changed at any time through ``ShiftwiseConv2d.form`` or :func:`set_form`.
        nonfinite: where NaN and infinity at one pixel of a map may go. ``"anywhere"``: form ``"auto"`` takes what is
            fastest; matrix products (``"gemm"``, ``"toeplitz"``) carry them to other pixels of their channel.
            ``"local"``: it takes only forms that keep them where the kernel reaches (``"assembled"``). A form that is
            asked for by its name runs either way. Assignable on a layer (``ShiftwiseConv2d.nonfinite``).
        edges: E, how many orders place the tiles. ``None``: 1 in mode ``"laid_out"``, 4 (the paper's) in mode
            ``"shiftwise"``. More than 1 in mode ``"laid_out"`` adds edges of random order with a gain of 0: the
            function stays the same until training makes them grow.
        merge_parallel: replace a module whose forward is a sum of parallel convolutions (and BatchNorms) as a whole;
            False replaces the convolutions one by one.
        paths, ghost, seed: of mode ``"shiftwise"`` only: the paper's 2 parallel banks, its fraction 0.23 of channels
            that bypass the module, and the seed of everything that is drawn.
        guarantee: what a layer has to keep to, one word or several. ``"exact"``: no coarser arithmetic than the
            original convolution's. ``"deterministic"``: the same bits in every run on the same machine;
            ``torch.use_deterministic_algorithms(True)`` asks for it as well. With both, ``"auto"`` chooses among the
            forms that keep to it; a form that is asked for and does not is replaced by ``"assembled"``.
            ``"no_fallback"``: a call raises where another form than the one that was asked for would run.
            Assignable on a layer (``ShiftwiseConv2d.guarantee``); docs/design/forms.md says which form keeps what.
        layers: other settings for some layers: glob patterns of layer paths, each with a mapping of ``form``,
            ``nonfinite`` or ``guarantee``: ``{"stages.0.*": {"form": "shift"}}``. Of several patterns the last wins.
        ghost_budget: ``"layer"``: the fraction ``ghost`` of every layer. ``"global"``: as many on average, more where
            they are missed least; that takes calibration images (:func:`convert`).
        residual: of mode ``"shiftwise"``: whether the module adds its input to the sum of its branches. True as
            published, False not; ``"auto"`` what brings a layer closer to its original kernels.
        orders: of mode ``"shiftwise"``: ``"random"``, or ``"opposite"`` as in the paper's first steps, which have one
            edge: the tiles in order along rows, in reverse order along columns.

    Raises:
        ValueError: an argument is outside its range.
    """

    mode: Mode = "laid_out"
    min_kernel: int = 7
    tile: int | None = None
    form: Form = "auto"
    nonfinite: Nonfinite = "anywhere"
    edges: int | None = None
    merge_parallel: bool = True
    paths: int = 2
    ghost: float = 0.23
    seed: int = 123
    ghost_budget: GhostBudget = "layer"
    residual: bool | Literal["auto"] = "auto"
    orders: OrderRule = "random"
    guarantee: tuple[Guarantee, ...] | Guarantee = ()
    layers: PerLayer | Mapping[str, Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name in ("min_kernel", "tile", "edges", "paths", "seed"):  # NumPy's integers are integers, too
            value = getattr(self, name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, name, int(value))
        if self.mode not in get_args(Mode):
            raise ValueError(f"SWConfig.mode: got {self.mode!r}, expected one of {get_args(Mode)}")
        if self.form not in get_args(Form):
            raise ValueError(f"SWConfig.form: got {self.form!r}, expected one of {get_args(Form)}")
        if self.nonfinite not in get_args(Nonfinite):
            raise ValueError(f"SWConfig.nonfinite: got {self.nonfinite!r}, expected one of {get_args(Nonfinite)}")
        object.__setattr__(self, "guarantee", read_guarantee(self.guarantee, "SWConfig.guarantee"))
        object.__setattr__(self, "layers", _read_layers(self.layers))
        if self.ghost_budget not in get_args(GhostBudget):
            raise ValueError(
                f"SWConfig.ghost_budget: got {self.ghost_budget!r}, expected one of {get_args(GhostBudget)}"
            )
        if not isinstance(self.residual, bool) and self.residual != "auto":
            raise ValueError(f"SWConfig.residual: got {self.residual!r}, expected True, False or 'auto'")
        if self.orders not in get_args(OrderRule):
            raise ValueError(f"SWConfig.orders: got {self.orders!r}, expected one of {get_args(OrderRule)}")
        for name in ("min_kernel", "paths"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"SWConfig.{name}: got {getattr(self, name)!r}, expected an integer of at least 1")
        if not isinstance(self.merge_parallel, bool):
            raise ValueError(f"SWConfig.merge_parallel: got {self.merge_parallel!r}, expected True or False")
        if not isinstance(self.ghost, float | int) or not 0 <= self.ghost < 1:
            raise ValueError(f"SWConfig.ghost: got {self.ghost!r}, expected a fraction from 0 to below 1")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ValueError(f"SWConfig.seed: got {self.seed!r}, expected an integer from 0 to below 2**32")
        for name in ("tile", "edges"):
            if getattr(self, name) is not None and not is_count(getattr(self, name)):
                raise ValueError(
                    f"SWConfig.{name}: got {getattr(self, name)!r}, expected None or an integer of at least 1"
                )

        if self.orders == "opposite" and self.edge_count != 1:
            raise ValueError(
                f"SWConfig.orders: got 'opposite' with {self.edge_count} edges, which would all be alike; "
                "expected edges=1"
            )

    @property
    def edge_count(self) -> int:
        """``edges``, or what None stands for in this mode."""
        return self.edges or (4 if self.mode == "shiftwise" else 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        layers = {pattern: {name: _plain(value) for name, value in changes} for pattern, changes in self._per_layer}
        return {**asdict(self), "guarantee": list(self.guarantee), "layers": layers}

    def settings_for(self, path: str) -> dict[str, Any]:
        """``form``, ``guarantee`` and ``nonfinite`` of the layer at a path."""
        settings = {name: getattr(self, name) for name in PER_LAYER}
        for pattern, changes in self._per_layer:
            if matches_pattern(path, pattern):
                settings.update(changes)
        return settings

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of ``layers``."""
        return tuple(pattern for pattern, _ in self._per_layer)

    @property
    def _per_layer(self) -> PerLayer:
        return cast("PerLayer", self.layers)

    @classmethod
    def preset(cls, name: str) -> SWConfig:
        """A configuration that has a name: a step of the paper's evolution table, ``"sw#0"`` to ``"sw#27"``.

        :data:`sw_transplant.science.ladder.LADDER` says what each is, and what it takes beside the configuration.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in _NAMED:
            raise ValueError(f"SWConfig.preset: got {name!r}, expected one of {', '.join(_NAMED)}")
        return _NAMED[name]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SWConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown fields, or a value outside its range.
        """
        if not isinstance(values, dict):
            raise ValueError(f"SWConfig: got {type(values).__name__}, expected an object with the fields of SWConfig")
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"SWConfig: unknown fields {unknown}; was this written by a newer sw_transplant?")
        return cls(**values)


def matches_pattern(path: str, pattern: str) -> bool:
    """Whether a layer is meant by a pattern: it, or something above it."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def read_guarantee(value: Any, what: str) -> tuple[Guarantee, ...]:
    """Guarantees as a tuple in the order of the alphabet.

    Args:
        value: a word, several, or None for none.
        what: where it was given, for the message.

    Raises:
        ValueError: no guarantee has this name.
    """
    words = () if value is None else (value,) if isinstance(value, str) else value
    try:
        known = sorted(set(words))
    except TypeError:
        known = [None]
    if any(word not in get_args(Guarantee) for word in known):
        raise ValueError(f"{what}: got {value!r:.80}, expected some of {get_args(Guarantee)}")
    return tuple(known)


def _read_layers(value: Any) -> PerLayer:
    """Patterns with their settings as tuples, which can be compared and hashed."""
    expected = f"expected patterns of layer paths, each with a mapping of some of {PER_LAYER}"
    try:
        given = {pattern: dict(changes) for pattern, changes in dict(value).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"SWConfig.layers: got {value!r:.80}, {expected}") from error
    read = []
    for pattern, changes in given.items():
        if not isinstance(pattern, str) or not changes or not set(changes) <= set(PER_LAYER):
            raise ValueError(f"SWConfig.layers: got {pattern!r:.80} with {changes!r:.80}, {expected}")
        SWConfig(**changes)  # which refuses what no layer can have
        if "guarantee" in changes:
            changes["guarantee"] = read_guarantee(changes["guarantee"], "SWConfig.layers")
        read.append((pattern, tuple(sorted(changes.items()))))
    return tuple(read)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


_NAMED: dict[str, SWConfig] = {}


def name_config(name: str, config: SWConfig) -> None:
    """Makes a configuration known to :meth:`SWConfig.preset`; who has a table of configurations enters it here.

    Raises:
        ValueError: the name is taken by another configuration.
    """
    if _NAMED.setdefault(name, config) != config:
        raise ValueError(f"name_config: {name!r} is taken by {_NAMED[name]}")


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
