"""Milliseconds: what a pruned network takes, in whichever program runs it.

MACs are counted, milliseconds measured: by the clock of the process, so that other
programs take nothing from the count, with the networks in turns on one thread.
`measure` compares nets, `compare` two of them for a row of results, `Table` foresees
them layer by layer, `meet` makes a plan for a share of the time, `export_onnx` writes
what other programs read.
"""

from lib.latency.runtimes import (
    export_onnx,
    find_missing,
    load_onnx,
    prepare,
    version_of,
)
from lib.latency.table import Table, meet, write_layer
from lib.latency.timing import Timing, compare, interleave, measure
