"""What the ShiftwiseConv paper measures and tabulates.

Read in this order:

    presets        the steps of its evolution table, as configurations
    utilisation    how much of the map a module's kernels can reach
"""

from sw_transplant.science.presets import PRESETS, Preset
from sw_transplant.science.utilisation import Utilisation, utilisation

__all__ = ["PRESETS", "Preset", "Utilisation", "utilisation"]
