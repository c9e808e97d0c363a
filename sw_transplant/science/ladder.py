"""The steps of the ShiftwiseConv paper from SLaK to SW: each builds its network, its sparsity and its recipe.

A step is more than a configuration of ``convert``: another frame, other widths, squeeze and excitation or not, another
share of filters out of use, another recipe.

    model = build("sw#11")                     # ready to train
    sparsity = LADDER["sw#11"].filter_sparsity(model, total_steps)
    recipe = LADDER["sw#11"].recipe()

Accuracies are the paper's, ImageNet-1k top-1 in percent, after 120 epochs of training from scratch and, where it gives
one, after 300 (ablation table; Table 9 of the supplement). They are what to compare a training run with; a conversion
alone does not reach them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from sw_transplant.config import OrderRule, SWConfig, name_config
from sw_transplant.science.recipes import RECIPES, Recipe
from sw_transplant.sparsity.filter_sparsity import FilterSparsity
from sw_transplant.surgery.convert import convert

SLAK_WIDTH = 1.3
"""What widens SLaK's frame; the ghosts take as many channels out of the large kernels again."""


@dataclass(frozen=True)
class Step:
    """One step of the table.

    Attributes:
        name: ``"sw#11"``.
        what: what the step changes.
        model: timm name of its network; empty where it is not built.
        settings: arguments of the network beside those of the name.
        config: what ``convert`` makes a SLaK into that is close to this step; None where no conversion does.
        converts: whether the network is one that ``convert`` makes, with ``config``.
        sparsity: share of filters (or, with ``only_L`` False, also of weights) out of use while training; None if not
            given.
        only_L: large kernels only.
        trained_as: the recipe, a key of :data:`recipes.RECIPES` without the epochs.
        accuracy_120, accuracy_300: the paper's, in percent; None where it gives none.
        published: parameters in millions and multiplications in thousand millions, where the paper gives them.
        published_in_use: whether these are counted without what is out of use: SLaK's are, SW's are not.
        note: what the texts leave open, or why the step is not built.
    """

    name: str
    what: str
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    config: SWConfig | None = None
    converts: bool = False
    sparsity: float | None = None
    only_L: bool = True
    trained_as: str = "slak_tiny"
    accuracy_120: float | None = None
    accuracy_300: float | None = None
    published: tuple[float, float] | None = None
    published_in_use: bool = False
    note: str = ""

    def build(self, **settings: Any) -> nn.Module:
        """The network with random weights and the recipe's stochastic depth, in train mode.

        Args:
            settings: arguments of the network that override those of the step, ``num_classes=10`` for instance.

        Raises:
            NotImplementedError: the step is not built; the message says why.
        """
        if not self.model:
            raise NotImplementedError(f"{self.name}: {self.note}")
        import timm

        import sw_transplant.models  # noqa: F401  registers the networks

        drop_path = self.recipe().drop_path or 0.0
        model = timm.create_model(self.model, **{"drop_path_rate": drop_path, **self.settings, **settings})
        if self.converts:
            model = convert(model, self.config, inplace=True)
        return model.train()

    def recipe(self, epochs: int = 120) -> Recipe:
        """How to train it, for 120 or 300 epochs; the sparsity is that of the step."""
        recipe = RECIPES[f"{self.trained_as}_{epochs}"]
        pruning = None
        if recipe.pruning is not None and self.sparsity is not None:
            gap = recipe.pruning.sparse_gap or (131 if self.only_L else None)
            pruning = replace(recipe.pruning, sparsity=self.sparsity, only_L=self.only_L, sparse_gap=gap)
        return replace(recipe, model=self.model or recipe.model, pruning=pruning)

    def filter_sparsity(
        self, model: nn.Module, total_steps: int | None = None, **options: Any
    ) -> FilterSparsity | None:
        """What prunes and grows the network while it trains; None where the step's sparsity is not given.

        Args:
            model: of :meth:`build`.
            total_steps: of the training.
            options: further arguments of :class:`FilterSparsity`.
        """
        pruning = self.recipe().pruning
        if pruning is None:
            return None
        given = {
            "only_L": pruning.only_L,
            "adaptation_rate": pruning.prune_rate,
            "update_frequency": pruning.update_frequency,
            "sparse_gap": pruning.sparse_gap or 1,
            "total_steps": total_steps,
        }
        return FilterSparsity(model, pruning.sparsity, **{**given, **options})


def build(name: str, **settings: Any) -> nn.Module:
    """The network of a step, ready to train (:meth:`Step.build`).

    Args:
        name: of the step, ``"sw#0"`` to ``"sw#27"``.
        settings: arguments of the network that override those of the step.

    Raises:
        ValueError: there is no such step.
        NotImplementedError: the step is not built.

    Example:
        >>> sum(p.numel() for p in build("sw#24").parameters())                              # doctest: +SKIP
        31830168
    """
    if name not in LADDER:
        raise ValueError(f"build: got {name!r}, expected one of {', '.join(LADDER)}")
    return LADDER[name].build(**settings)


# ---- the table ------------------------------------------------------------------------------------------------------


def _shiftwise(tile: int, edges: int, paths: int, ghost: float) -> SWConfig:
    orders: OrderRule = "opposite" if edges == 1 else "random"
    return SWConfig(mode="shiftwise", tile=tile, edges=edges, paths=paths, ghost=ghost, residual=True, orders=orders)


def _in_slak(name: str, what: str, config: SWConfig, **more: Any) -> Step:
    """A step in SLaK's frame."""
    settings: dict[str, Any] = {
        "kernel_size": (51, 49, 47, 13, config.tile),
        "N_rep": config.edge_count,
        "N_path": config.paths,
        "ghost_ratio": config.ghost,
        "orders": config.orders,
    }
    settings |= {key: more.pop(key) for key in ("cut_borders",) if key in more}
    return Step(name, what, "sw_slak_tiny", MappingProxyType(settings), config, **{"sparsity": 0.4, **more})


def _in_unireplknet(name: str, what: str, config: SWConfig, **more: Any) -> Step:
    """A step in UniRepLKNet's frame; up to #23 with SLaK's sparsity, as all that SW inherits (appendix C.1)."""
    share = 0.3 if more.get("trained_as") == "sw_tiny" else 0.4
    settings: dict[str, Any] = {"ghost_ratio": config.ghost}
    settings |= {key: more.pop(key) for key in ("se", "interleaved") if key in more}
    return Step(name, what, "sw_tiny", MappingProxyType(settings), config, **{"sparsity": share, **more})


_PAPER = _shiftwise(3, 4, 2, 0.23)
_SLAK_T = SWConfig(tile=5, form="assembled")
_LAID_OUT = SWConfig(tile=5, form="shift")
_NO_CONVOLUTION = (
    "The texts have no such row, only that #3 unifies the padding. Padded by N // 2, responses are cut off at the "
    "borders: that is no convolution with any large kernel, and convert, which keeps functions, does not make it."
)
_ONLY_COMPARED = (
    "The supplement (appendix D) only compares it with #15: sparsity acts like other first densities of the layers. It "
    "gives neither the densities nor an accuracy."
)
_BY_GRADIENTS = (
    "The supplement (C.2) says that the sparsity varies, by the state of the gradients at certain steps, and that this "
    "matters; not at which steps, by what rule or how much, and no accuracy."
)

_STEPS = (
    Step("sw#0", "SLaK-tiny, the start", "slak_tiny", config=_SLAK_T, sparsity=0.4, only_L=False,
         accuracy_120=81.6, published=(30.0, 5.0), published_in_use=True),
    Step("sw#1", "laid out, trained", "slak_tiny", config=_LAID_OUT, converts=True, sparsity=0.4, only_L=False,
         accuracy_120=82.27),
    Step("sw#2", "laid out, padding N // 2", note=_NO_CONVOLUTION),
    _in_slak("sw#3", "one bank for both strips, padding N // 2", _shiftwise(5, 1, 1, 0.0), accuracy_120=81.26,
             cut_borders=True, note="Its conversion from a SLaK has padding N - 1, as all steps from #4 on."),
    _in_slak("sw#4", "two paths (Rep x2)", _shiftwise(5, 1, 2, 0.0), accuracy_120=81.52),
    _in_slak("sw#6", "ghosts", _shiftwise(5, 1, 2, 0.23), accuracy_120=81.34,
             note="The texts only say that #7 differs from it by the size of the tiles."),
    _in_slak("sw#7", "tiles of 3 instead of 5", _shiftwise(3, 1, 2, 0.23), accuracy_120=81.44),
    _in_slak("sw#11", "four edges in random orders", _PAPER, accuracy_120=81.82),
    _in_slak("sw#15", "another initial sparsity (mean)", _PAPER, sparsity=None, accuracy_120=81.94,
             note="Its sparsity is called a mean, and not given: it is trained dense here."),
    Step("sw#16", "another initial sparsity, found otherwise", note=_ONLY_COMPARED),
    Step("sw#17", "sparsity varies during training", note=_BY_GRADIENTS),
    _in_unireplknet("sw#19", "depths and widths of UniRepLKNet", _PAPER, se=False, accuracy_120=82.25),
    _in_unireplknet("sw#20", "squeeze and excitation", _PAPER, accuracy_120=82.27, accuracy_300=82.70),
    _in_unireplknet("sw#23", "#20 with large kernels interleaved with small ones", _PAPER, interleaved=True,
                    note="The text does not say which blocks: ours are UniRepLKNet's. Comparable to #20."),
    _in_unireplknet("sw#24", "training settings of Table 8, u = 100", _PAPER, trained_as="sw_tiny", accuracy_120=82.27,
                    accuracy_300=83.39, published=(31.0, 5.0)),
    _in_unireplknet("sw#25", "#24 without squeeze and excitation", _PAPER, se=False, trained_as="sw_tiny",
                    accuracy_120=82.14),
    _in_unireplknet("sw#26", "#24 without ghosts", _shiftwise(3, 4, 2, 0.0), trained_as="sw_tiny", accuracy_300=82.99),
    _in_unireplknet("sw#27", "#24 with a sparsity of 0.2", _PAPER, trained_as="sw_tiny", sparsity=0.2,
                    accuracy_300=83.46),
)  # fmt: skip

LADDER: dict[str, Step] = {step.name: step for step in _STEPS}
"""All steps that the texts tell of, ``sw#0`` to ``sw#27``, and ``sw#2``; of the numbers in between they say nothing."""

for _step in _STEPS:
    if _step.config is not None:
        name_config(_step.name, _step.config)
