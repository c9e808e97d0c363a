"""Shiftwise convolutions for the large-kernel ConvNets you already have: find, rewrite, verify, run.

import sw_transplant as sw
converted = sw.convert(model)              # the same function, large kernels as shifted small filters
print(sw.verify(model, converted))
"""

import sw_transplant.interrupts  # before the seconds that PyTorch takes to import
import sw_transplant.science.ladder  # noqa: F401  names the configurations of SWConfig.preset
from sw_transplant.check.verify import verify
from sw_transplant.config import SWConfig
from sw_transplant.find.match import NoLargeKernelError
from sw_transplant.find.search import inspect_model
from sw_transplant.find.summary import summary
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.surgery.convert import convert
from sw_transplant.surgery.freezing import freeze, unfreeze
from sw_transplant.surgery.io import load, save
from sw_transplant.surgery.merge import merge
from sw_transplant.surgery.restore import restore
from sw_transplant.surgery.tuning import set_form, tune
from sw_transplant.surgery.warming import warm_up

__version__ = "0.1.0"
__all__ = [
    "NoLargeKernelError",
    "SWConfig",
    "ShiftwiseConv2d",
    "convert",
    "freeze",
    "inspect_model",
    "load",
    "merge",
    "restore",
    "save",
    "set_form",
    "summary",
    "tune",
    "unfreeze",
    "verify",
    "warm_up",
]
