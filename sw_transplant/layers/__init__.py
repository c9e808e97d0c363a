"""The modules that take the place of large depthwise convolutions, and what they remember between calls.

Read in this order:

    branch              one bank of tiles, its placements, and what follows the shift
    tables              the integers that say where tiles go
    masks               which tiles of a bank are in use
    shiftwise_conv2d    ShiftwiseConv2d: a sum of branches, laid out from kernels
    orders              what the paper's module draws at random
    shared_bank         the bank that the branches of the paper's module share
    sw_conv2d           SWConv2d: the paper's module
    watch, shortcut     whether a layer is still what it was, and the shortest way through it
    recompute           less memory in training
"""
