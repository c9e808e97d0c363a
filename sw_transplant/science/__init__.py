"""What the papers measure and tabulate.

Read in this order:

    recipes        how the published networks were trained, as data
    ladder         the steps from SLaK to SW: each builds its network, its sparsity and its recipe
    cost           parameters and multiplications, with and without what is out of use
    utilisation    how much of the map a module's kernels can reach
"""

from sw_transplant.science.cost import Cost, count_cost
from sw_transplant.science.ladder import LADDER, Step, build
from sw_transplant.science.recipes import DOWNSTREAM, RECIPES, Downstream, Pruning, Recipe, layer_group
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
    "layer_group",
    "utilisation",
]
