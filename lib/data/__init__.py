"""Data sets as uint8 tensors in memory, and batches drawn from them."""

from lib.data.batches import batches as batches
from lib.data.batches import count_batches as count_batches
from lib.data.batches import crop_flip as crop_flip
from lib.data.batches import draw_epoch as draw_epoch
from lib.data.batches import normalise as normalise
from lib.data.batches import resize as resize
from lib.data.images import ImageSet as ImageSet
from lib.data.images import split_validation as split_validation
from lib.data.sources import download as download
from lib.data.sources import load as load
