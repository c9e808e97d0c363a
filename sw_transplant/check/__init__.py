"""Whether two models compute the same function, and on which images.

Read in this order:

    model_input    what a model takes: size, channels, normalisation
    images         images from folders, archives and arrays, prepared for a model
    comparison     the numbers of a comparison, and the report
    verify         runs both models and compares
"""
