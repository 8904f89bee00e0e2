"""NISP: the importance of the final responses, propagated back through the network.

Yu et al., "NISP: Pruning Networks using Neuron Importance Score Propagation", CVPR
2018. inf_fs (how much each final response matters) -> propagation -> `lib.plan`.
"""

from lib.nisp.inf_fs import inf_fs
from lib.nisp.propagation import propagate

__all__ = ["inf_fs", "propagate"]
