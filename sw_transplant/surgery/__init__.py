"""What is done to models: convert, choose forms, merge back, save and load.

Read in this order:

    convert       from matches to modules in the original tree: everything, or nothing
    sharing       the bank whose placements come closest to given kernels
    approximate   mode "shiftwise": the paper's module, as close to a layer as its bank allows
    tuning        the form of every layer, by hand or by measuring
    merge         back to plain convolutions
    io            save and load
"""
