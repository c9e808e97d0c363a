"""Shiftwise convolutions for the large-kernel ConvNets you already have: find, rewrite, verify, run.

import sw_transplant as sw
converted = sw.convert(model)              # the same function, large kernels as shifted small filters
print(sw.verify(model, converted))
"""

from .config import SWConfig
from .convert import convert
from .find import inspect_model
from .io import load, save
from .match import NoLargeKernelError
from .merge import merge
from .modules import ShiftwiseConv2d
from .report import summary
from .tuning import set_form, tune
from .verify import verify

__version__ = "0.1.0"
__all__ = [
    "NoLargeKernelError",
    "SWConfig",
    "ShiftwiseConv2d",
    "convert",
    "inspect_model",
    "load",
    "merge",
    "save",
    "set_form",
    "summary",
    "tune",
    "verify",
]
