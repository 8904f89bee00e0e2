"""SCOP: a scientific control decides which channels a network relies on.

Tang et al., "SCOP: Scientific Control for Reliable Neural Network Pruning", NeurIPS
2020.
control (what stands in for the image) -> selection (beta) -> importance -> `lib.plan`;
diagnostics and knockoff_filter ask how good a control is.
"""

from lib.scop.controls import Control, build_control
from lib.scop.layers import block_layers
from lib.scop.selection import Betas, importance, learn_betas, read_scales, select
