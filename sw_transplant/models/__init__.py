"""Checkpoint-compatible definitions of the published large-kernel networks, registered with timm on import.

After ``import sw_transplant.models``, ``timm.create_model`` knows ``slak_tiny|small|base|large``,
``replknet_31b|31l|xl``, ``unireplknet_a|f|p|n|t|s|b|l|xl``, ``sw_tiny|small|base|large`` and
``sw_slak_tiny|small|base``. Parameter names and shapes are the published ones; official weight files are read by
`load_checkpoint`.

Read in this order:

    staged          what all share: stages, head, and the interface that timm expects
    large_kernel    the layer of SLaK and RepLKNet: parallel depthwise convolutions, summed
    slak            SLaK
    replknet        RepLKNet
    unireplknet     UniRepLKNet
    shiftwise       SW, the network of the ShiftwiseConv paper
    cut_borders     its module with filters padded by N // 2, as one of its first steps has it
    shiftwise_slak  SW in SLaK's frame, the networks of its first steps
    registry        how they enter timm: preprocessing, and the builder of every size
    unpickling      what may be in a file of weights, and no more
    checkpoint      official weight files, read strictly
"""

try:
    import timm  # noqa: F401
except ImportError as error:
    raise ImportError('sw_transplant.models needs timm: pip install "sw-transplant[timm]"') from error

from sw_transplant.models.checkpoint import load_checkpoint
from sw_transplant.models.replknet import RepLKNet
from sw_transplant.models.shiftwise import ShiftWise
from sw_transplant.models.shiftwise_slak import ShiftWiseSLaK
from sw_transplant.models.slak import SLaK
from sw_transplant.models.unireplknet import UniRepLKNet

__all__ = ["RepLKNet", "SLaK", "ShiftWise", "ShiftWiseSLaK", "UniRepLKNet", "load_checkpoint"]
