"""MAP: how far to prune depth, width and resolution together.

Wang et al., "Accelerate CNNs from Three Dimensions: A Comprehensive Pruning Framework",
ICML 2021. blocks and space (what each dimension removes) -> design and collect (points
that are pruned, fine-tuned and measured) -> fit (accuracy as a function of depth, width
and resolution) -> optimum (the best of them for a budget).
"""

from lib.map3d.blocks import Block, find_blocks, order_removal, probe_blocks
from lib.map3d.collect import (
    collect,
    prune_once,
    read_points,
    sparsify,
    write_points,
)
from lib.map3d.costs import FORMULA, Measured, PowerLaw, fit_exponents
from lib.map3d.design import DESIGNS, find_floors, make_design
from lib.map3d.space import Shape, Space, score_channels

__all__ = [
    "DESIGNS",
    "FORMULA",
    "Block",
    "Measured",
    "PowerLaw",
    "Shape",
    "Space",
    "collect",
    "find_blocks",
    "find_floors",
    "fit_exponents",
    "make_design",
    "order_removal",
    "probe_blocks",
    "prune_once",
    "read_points",
    "score_channels",
    "sparsify",
    "write_points",
]
