"""MAP: how far to prune depth, width and resolution together.

Wang et al., "Accelerate CNNs from Three Dimensions: A Comprehensive Pruning Framework",
ICML 2021. blocks and space (what each dimension removes) -> design and collect (points
that are pruned, fine-tuned and measured) -> fit (accuracy as a function of depth, width
and resolution) -> optimum (the best of them for a budget). `graph`, where it may be
given, is that of the model in question, for it to be traced once.
"""

from lib.map3d.blocks import find_blocks, order_removal, probe_blocks
from lib.map3d.collection import collect, prune_once, read_points, write_points
from lib.map3d.costs import (
    FORMULA,
    RIVALS,
    PowerLaw,
    fit_exponents,
    pick_rivals,
    rank_lattice,
)
from lib.map3d.design import DESIGNS, find_floors, make_design
from lib.map3d.fitting import count_parameters, fit, jacobian_rank
from lib.map3d.predictor import Map
from lib.map3d.search import optimum
from lib.map3d.space import Shape, Space, score_channels
from lib.map3d.uncertainty import (
    bootstrap_maps,
    bootstrap_optimum,
    find_misfit,
    leave_one_out,
    regret,
)
