"""What a network does with its channels: one pass watched, and what follows from it.

trace (the operations of one pass, with a tag on every channel) -> structure (which
channels stand or fall together).
"""

from lib.graph.dry_run import Node
from lib.graph.structure import (
    RELUS,
    Graph,
    Group,
    build_graph,
    droppable_blocks,
    dropped_units,
    list_prunable,
)
from lib.graph.tracing import Layer

__all__ = [
    "RELUS",
    "Graph",
    "Group",
    "Layer",
    "Node",
    "build_graph",
    "droppable_blocks",
    "dropped_units",
    "list_prunable",
]
