"""Data sets as uint8 tensors in memory, and batches drawn from them."""

from lib.data.batching import batches, batches_for, count_batches
from lib.data.images import ImageSet, split_validation
from lib.data.sources import download, load
