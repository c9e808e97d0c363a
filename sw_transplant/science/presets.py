"""The steps of the paper's evolution table from SLaK to SW, as configurations of ``convert``.

A step is a configuration, and for some also another network or a sparsity that a configuration does not hold: each
entry names them. Accuracies are the paper's, ImageNet-1k top-1 in percent, after 120 epochs of training from scratch
and, where it gives one, after 300 (ablation table; Table 9 of the supplement). They are what to compare a training run
with; a conversion alone does not reach them.

Three things differ, or are not said: the ghosts (0.23) come in here with #19, whose widths they go with; the padding
N // 2 of #3 cuts responses off at the borders, ours keeps them; the sparsity is SLaK's 40% up to #11 and the 0.3 that
Table 9 names from #19 on, that of #15 ("mean") is not given.
"""

from __future__ import annotations

from dataclasses import dataclass

from sw_transplant.config import SWConfig, name_config


@dataclass(frozen=True)
class Preset:
    """One step of the table.

    Attributes:
        what: what the step changes.
        config: for ``convert``.
        model: timm name of the network that the step is about.
        sparsity: share of filters out of use while training, for :class:`sparsity.FilterSparsity`; None if not given.
        accuracy_120, accuracy_300: the paper's, in percent; None where it gives none.
    """

    what: str
    config: SWConfig
    model: str
    sparsity: float | None
    accuracy_120: float | None
    accuracy_300: float | None = None


def _shiftwise(tile: int, edges: int, paths: int, ghost: float = 0.0) -> SWConfig:
    return SWConfig(mode="shiftwise", tile=tile, edges=edges, paths=paths, ghost=ghost)


_PAPER = _shiftwise(3, 4, 2, 0.23)

PRESETS: dict[str, Preset] = {
    "sw#0": Preset("SLaK-tiny, the start", SWConfig(tile=5, form="assembled"), "slak_tiny", 0.4, 81.6),
    "sw#1": Preset("laid out, trained", SWConfig(tile=5, form="shift"), "slak_tiny", 0.4, 82.27),
    "sw#3": Preset("one bank for both strips", _shiftwise(5, 1, 1), "slak_tiny", 0.4, 81.26),
    "sw#4": Preset("two paths (Rep x2)", _shiftwise(5, 1, 2), "slak_tiny", 0.4, 81.52),
    "sw#7": Preset("tiles of 3 instead of 5", _shiftwise(3, 1, 2), "slak_tiny", 0.4, 81.44),
    "sw#11": Preset("two paths, four edges", _shiftwise(3, 4, 2), "slak_tiny", 0.4, 81.82),
    "sw#15": Preset("another initial sparsity (mean)", _shiftwise(3, 4, 2), "slak_tiny", None, 81.94),
    "sw#19": Preset("depths and widths of UniRepLKNet", _PAPER, "sw_tiny", 0.3, 82.25),
    "sw#20": Preset("squeeze and excitation", _PAPER, "sw_tiny", 0.3, 82.27, 82.70),
    "sw#24": Preset("training settings of Table 8, u = 100", _PAPER, "sw_tiny", 0.3, 82.27, 83.39),
    "sw#25": Preset("#24 without squeeze and excitation", _PAPER, "sw_tiny", 0.3, 82.14),
    "sw#26": Preset("#24 without ghosts", _shiftwise(3, 4, 2), "sw_tiny", 0.3, None, 82.99),
    "sw#27": Preset("#24 with a sparsity of 0.2", _PAPER, "sw_tiny", 0.2, None, 83.46),
}


for _name, _preset in PRESETS.items():
    name_config(_name, _preset.config)
