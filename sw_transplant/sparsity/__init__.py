"""Pruning and growing of whole filters while a model trains (ShiftwiseConv, appendix C; SLaK, appendix B).

Read in this order:

    masked_layers      the weights that carry masks, and the table of their densities
    snip               which filters matter: SNIP's scores
    exact              how an update renews a mask
    published          the rules of the official programs, to compare with
    filter_sparsity    FilterSparsity: prunes and grows as an optimizer steps
    averages           averaged weights that stay sparse
    callback           the same under the Trainer of transformers
"""

from sw_transplant.sparsity.averages import apply_masks, follow_masks
from sw_transplant.sparsity.callback import sparsity_callback
from sw_transplant.sparsity.filter_sparsity import FilterSparsity
from sw_transplant.sparsity.masked_layers import sparsity_report
from sw_transplant.sparsity.snip import snip_scores

__all__ = ["FilterSparsity", "apply_masks", "follow_masks", "snip_scores", "sparsity_callback", "sparsity_report"]
