"""What to keep: plain data, made from scores, checked against the network's structure.

A `Plan` names output channels to keep per layer, blocks to drop and the input
resolution. `from_scores` turns any method's scores into one; `resolve` checks a plan
against a traced network and is what `lib.surgery` acts on.
"""

from lib.plan.ranking import count_share, from_scores
from lib.plan.record import Plan
from lib.plan.resolving import Kept, resolve

__all__ = ["Kept", "Plan", "count_share", "from_scores", "resolve"]
