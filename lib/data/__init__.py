"""Data sets as uint8 tensors in memory, and batches drawn from them."""

from lib.data.batching import batches as batches
from lib.data.batching import count_batches as count_batches
from lib.data.images import ImageSet as ImageSet
from lib.data.images import split_validation as split_validation
from lib.data.sources import download as download
from lib.data.sources import load as load
