"""The modules that take the place of large depthwise convolutions, and what they remember between calls.

Read in this order:

    folding             BatchNorms in eval mode as numbers
    placed_tiles        what a branch is to the forms
    branch              one bank of tiles, its placements, and what follows the shift
    tables              the integers that say where tiles go
    masks               which tiles of a bank are in use
    layout              how a dense kernel lies in a bank
    parameters          what belongs to a parameter beside its values, and is kept
    watch               whether a layer is still what it was
    recompute           less memory in training
    plan                what a call does
    shortcut            the shortest way for the next call that is just like it
    planner             who gives a layer its plans, and how long these are kept
    frozen              plans that compiled and captured calls take as they are
    computed            a weight that is computed, and refuses to be written to
    as_conv2d           the attributes of an nn.Conv2d, and the plain kernels that a layer equals
    shiftwise_conv2d    ShiftwiseConv2d: a sum of branches, laid out from kernels
    orders              what the paper's module draws at random
    order_buffers       the same as buffers of a module, and what follows from them
    zeros               masks from the zeros of sparse weights
    shared_bank         the bank that the branches of the paper's module share
    ghosts              the channels that bypass it
    sw_conv2d           SWConv2d: the paper's module
"""

from sw_transplant.layers.branch import Branch
from sw_transplant.layers.shiftwise_conv2d import ShiftwiseConv2d
from sw_transplant.layers.sw_conv2d import SWConv2d

__all__ = ["Branch", "SWConv2d", "ShiftwiseConv2d"]
