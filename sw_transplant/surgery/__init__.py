"""What is done to models: convert, choose forms, merge or restore, save and load.

Read in this order:

    copies        the model itself, or a copy that shares nothing with it
    convert       from matches to modules in the original tree: everything, or nothing
    sharing       the bank whose placements come closest to given kernels
    savers        what others write of a model, and that it is not read at random
    origin        what a layer took the place of, and weights that have its names
    approximate   mode "shiftwise": the paper's module, as close to a layer as its bank allows
    calibration   the same by calibration on images
    distill       training towards the original, without labels
    race          which of several is the fastest, and whether that is certain
    tuning        the form of every layer, by hand or by measuring
    freezing      inference without work on weights, compiled and captured calls included
    warming       every kernel compiled ahead of the calls that need it
    merge         back to plain convolutions, as few as do
    restore       back to the original modules
    description   what a converted model is made of, as JSON
    sizes         whether a folder's weights and its description fit, before anything is built
    io            save and load
    hosts         libraries that write folders of their own
    names         how parameters are called in the original, and which are not to be decayed
"""
