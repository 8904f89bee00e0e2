"""NISP: the importance of the final responses, propagated back through the network.

Yu et al., "NISP: Pruning Networks using Neuron Importance Score Propagation", CVPR
2018. frl (what the classifier reads) -> infinite (how much each response matters) ->
propagation, one backward pass through the absolute network -> `lib.plan`; comparisons
asks whether it was worth it, activity what the closed form leaves out.
"""

from lib.nisp.activity import measure_activity
from lib.nisp.comparisons import (
    METHODS,
    find_retained,
    measure_errors,
    rank_layerwise,
    score_layers,
)
from lib.nisp.frl import collect_responses, score_frl
from lib.nisp.infinite import inf_fs
from lib.nisp.propagation import propagate
