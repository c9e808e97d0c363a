"""Reading a model: what can be converted, what cannot, and why. Nothing here changes a model.

Read in this order:

    rules     whether one layer can be replaced, as far as it can be told from the layer alone
    linear    reads a module's forward with torch.fx: is it a sum of depthwise convolutions of one input?
    match     the results as data: matches, skipped layers and their table
    shared    what mode "shiftwise" asks of a layer
    search    from a model to matches; `inspect_model`
    summary   what a converted model consists of, and how each layer ran
"""
