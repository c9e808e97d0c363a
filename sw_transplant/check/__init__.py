"""Whether two models compute the same function, and on which images.

Read in this order:

    model_input    what a model takes: size, channels, normalisation
    images         images from folders, archives and arrays, prepared for a model
    report         what was found, and the verdict
    comparison     the numbers of a comparison
    reference      both models in wide numbers, to tell rounding from difference
    rounding       what each converted layer rounds, beside the bound that is proven for it
    certificate    all of it in a file
    verify         runs both models and compares
    certify        the same for a file, in one call
    recheck        the file checked again
"""

from sw_transplant.check.certificate import Certificate
from sw_transplant.check.certify import certify
from sw_transplant.check.recheck import CheckReport, check_folder

__all__ = ["Certificate", "CheckReport", "certify", "check_folder"]
