"""What the papers measure and tabulate.

Read in this order:

    recipes        how the published networks were trained, as data
    ladder         the steps from SLaK to SW: each builds its network, its sparsity and its recipe
    cost           parameters and multiplications, with and without what is out of use
    erf            effective receptive fields
    utilisation    how much of the small convolutions' output is used
    coverage       the same as the authors' program counts it, tile by tile
"""

from sw_transplant.science.cost import Cost, count_cost, training_bytes
from sw_transplant.science.coverage import coverage, coverage_picture, published_utilisation
from sw_transplant.science.erf import effective_receptive_field, high_contribution_ratio, high_contribution_square
from sw_transplant.science.ladder import LADDER, Step, build
from sw_transplant.science.recipes import DOWNSTREAM, RECIPES, Downstream, Pruning, Recipe, layer_group, timm_settings
from sw_transplant.science.utilisation import Utilisation, utilisation

__all__ = [
    "DOWNSTREAM",
    "LADDER",
    "RECIPES",
    "Cost",
    "Downstream",
    "Pruning",
    "Recipe",
    "Step",
    "Utilisation",
    "build",
    "count_cost",
    "coverage",
    "coverage_picture",
    "effective_receptive_field",
    "high_contribution_ratio",
    "high_contribution_square",
    "layer_group",
    "published_utilisation",
    "timm_settings",
    "training_bytes",
    "utilisation",
]
