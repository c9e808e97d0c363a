"""Reading a model: what can be converted, what cannot, and why. Nothing here changes a model.

Reading proposes, a proof disposes. Read in this order:

    code         what the code behind a forward mentions, without running it
    rules        whether one layer can be replaced, as far as it can be told from the layer alone
    linear       reads a module's forward: is it a sum of depthwise convolutions of one input?
    match        the results as data: matches, skipped layers and their table
    parameters   what a layer's parameters are asked before others take their place
    keep         what a layer keeps of the module whose place it takes
    candidate    the module that may take the place of a site
    traces       what a run leaves behind: random numbers drawn, attributes and tensors written to
    trial        one call of a module, and everything that comes of it
    specimen     private copies of a site, to be run
    proof        original and candidate side by side: what one does and the other does not
    notes        what in a model's own code may notice a conversion
    reach        what can be come to from an attribute or a function
    closures     who holds a part of a model beside its place in the tree; what a copy shares with its original
    select       which layers are meant
    describe     from what reading found to a match
    shared       what mode "shiftwise" asks of a layer
    search       from a model to matches; `inspect_model`
    summary      what a converted model consists of, and how each layer ran
"""
